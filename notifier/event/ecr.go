package event

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Subscription is an SNS topic that asks whether it may send to us. Whoever
// confirms it needs only these: the URL that the message wants to be asked is
// compared with them and goes no further.
type Subscription struct {
	TopicARN string // arn:aws:sns:<region>:<account>:<name>
	Host     string // of the topic's region: sns.<region>.amazonaws.com, or .com.cn
	Token    string // a secret: who has it can confirm; letters and digits
}

var (
	topicARN = regexp.MustCompile(`^arn:(aws|aws-cn|aws-us-gov):sns:([a-z0-9-]{1,32}):[0-9]{12}:[A-Za-z0-9_.-]{1,256}$`)
	snsToken = regexp.MustCompile(`^[A-Za-z0-9]{1,1000}$`)
)

// ecr reads the events that ECR puts on EventBridge: as an API destination
// gets them, wrapped by SNS, or as CloudEvents of an input transformer.
func ecr(d Delivery, r *Result) error {
	var b struct {
		Type         string // of an SNS message, as the rest
		TopicARN     string `json:"TopicArn"`
		Message      string
		Token        string
		SubscribeURL string
	}
	// The keys of SNS and EventBridge differ in more than their case, but for
	// "type" of CloudEvents, which TopicArn tells apart.
	if err := unmarshal(d.Body, &b); err != nil {
		return err
	}
	switch {
	case b.TopicARN == "":
		return eventBridge(d.Body, r)
	case b.Type == "SubscriptionConfirmation":
		s, err := subscription(d.Topic, b.TopicARN, b.Token, b.SubscribeURL)
		if err != nil {
			r.ignore(Handshake, "SNS's handshake, not confirmed: %w", err)
			return nil
		}
		r.Confirm = &s
	case d.Topic != "" && b.TopicARN != d.Topic:
		r.ignore(Foreign, "a message of topic %q, which is not the receiver's topic_arn", clip(b.TopicARN))
	case b.Type == "Notification":
		return eventBridge([]byte(b.Message), r)
	default:
		r.ignore(Foreign, "foreign message of SNS %q", clip(b.Type))
	}
	return nil
}

// subscription checks a handshake: of the topic that is expected, and with the
// URL that such a topic has.
func subscription(expected, topic, token, subscribeURL string) (Subscription, error) {
	m := topicARN.FindStringSubmatch(topic)
	switch {
	case expected == "":
		return Subscription{}, fmt.Errorf("the receiver has no topic_arn; topic %q asks", clip(topic))
	case topic != expected || m == nil:
		return Subscription{}, fmt.Errorf("topic %q is not the receiver's topic_arn", clip(topic))
	case !snsToken.MatchString(token):
		return Subscription{}, errors.New("no token, or not one of SNS")
	}
	host := "sns." + m[2] + "." + awsDomain(m[2])
	u, err := url.Parse(subscribeURL)
	if err != nil || u.Scheme != "https" || u.Host != host || u.User != nil {
		return Subscription{}, fmt.Errorf("its SubscribeURL is not of https://%s", host)
	}
	return Subscription{TopicARN: topic, Host: host, Token: token}, nil
}

func awsDomain(region string) string {
	if strings.HasPrefix(region, "cn-") {
		return "amazonaws.com.cn"
	}
	return "amazonaws.com"
}

// eventBridge reads one event of EventBridge, or one made from it as a
// CloudEvent. The host is made of account and region.
func eventBridge(body []byte, r *Result) error {
	var b struct {
		ID         string    `json:"id"`
		DetailType string    `json:"detail-type"`
		Account    string    `json:"account"`
		Region     string    `json:"region"`
		Time       timestamp `json:"time"`
		Detail     struct {
			Result     string `json:"result"`
			Repository string `json:"repository-name"`
			Digest     string `json:"image-digest"`
			Action     string `json:"action-type"`
			Tag        string `json:"image-tag"`
		} `json:"detail"`
		Type   string `json:"type"`   // of a CloudEvent, as the rest
		Source string `json:"source"` // urn:aws:ecr:<region>:<account>:repository/<name>; "aws.ecr" on EventBridge
		Data   struct {
			Repository string `json:"repositoryName"`
			Digest     string `json:"imageDigest"`
			Tag        string `json:"imageTag"`
			RegistryID string `json:"registryId"`
		} `json:"data"`
	}
	if err := unmarshal(body, &b); err != nil {
		return err
	}
	e := Event{DeliveryID: b.ID, Time: b.Time.Time}
	switch {
	case b.Type == "com.amazon.ecr.image.push":
		urn := strings.SplitN(b.Source, ":", 6)
		if len(urn) == 6 {
			b.Region, b.Account = urn[3], urn[4]
		}
		b.Account = cmp.Or(b.Data.RegistryID, b.Account)
		e.Repository, e.Tag, e.Digest = b.Data.Repository, b.Data.Tag, digest.Digest(b.Data.Digest)
	case b.DetailType != "ECR Image Action":
		r.ignore(Foreign, "foreign event %q", clip(cmp.Or(b.DetailType, b.Type)))
		return nil
	case b.Detail.Action == "DELETE":
		r.ignore(Deleted, "a delete in %q", clip(b.Detail.Repository))
		return nil
	case b.Detail.Action != "PUSH":
		r.ignore(Foreign, "foreign event: action-type %q", clip(b.Detail.Action))
		return nil
	case b.Detail.Result != "SUCCESS":
		r.ignore(Failed, "a push to %q with the result %q", clip(b.Detail.Repository), clip(b.Detail.Result))
		return nil
	default:
		e.Repository, e.Tag, e.Digest = b.Detail.Repository, b.Detail.Tag, digest.Digest(b.Detail.Digest)
	}
	if b.Account == "" || b.Region == "" {
		r.ignore(Invalid, "a push to %q without account or region", clip(e.Repository))
		return nil
	}
	e.Registry = b.Account + ".dkr.ecr." + b.Region + "." + awsDomain(b.Region)
	r.push(e)
	return nil
}
