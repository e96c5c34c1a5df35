package event

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// gridEvent is an event of Event Grid, in its own schema or as a CloudEvent.
type gridEvent struct {
	SpecVersion string          `json:"specversion"` // of a CloudEvent, as Type
	ID          string          `json:"id"`
	EventType   string          `json:"eventType"`
	Type        string          `json:"type"`
	Data        json.RawMessage `json:"data"`
}

// acr reads the webhooks of Azure Container Registry, one event each, and the
// events of Event Grid that tell of the same: arrays in its own schema, and
// CloudEvents, one alone or in an array. A handshake in the body is answered by
// giving back its code; the URL that it also holds is not asked. That of
// CloudEvents has no body, and does not come here.
func acr(d Delivery, r *Result) error {
	if bytes.HasPrefix(bytes.TrimSpace(d.Body), []byte("[")) {
		if !json.Valid(d.Body) {
			return errors.New("not the JSON it should be: an array, and something after it, or half of one")
		}
		for g, err := range elements[gridEvent](d.Body) {
			if err != nil {
				return err
			}
			if err := g.add(d, r); err != nil {
				return err
			}
		}
		return nil
	}
	var g gridEvent
	if err := unmarshal(d.Body, &g); err != nil {
		return err
	}
	if g.SpecVersion != "" {
		return g.add(d, r)
	}
	var e registryEvent
	if err := unmarshal(d.Body, &e); err != nil {
		return err
	}
	e.add(r, cmp.Or(e.Request.Host, d.Registry))
	return nil
}

func (g gridEvent) add(d Delivery, r *Result) error {
	kind := cmp.Or(g.EventType, g.Type)
	switch name := kind[strings.LastIndexByte(kind, '.')+1:]; name {
	case "ImagePushed", "ImageDeleted":
		var e registryEvent
		if err := unmarshal(g.Data, &e); err != nil {
			return fmt.Errorf("event %q: %w", clip(g.ID), err)
		}
		e.Action = map[string]string{"ImagePushed": "push", "ImageDeleted": "delete"}[name]
		e.ID = cmp.Or(g.ID, e.ID)
		e.add(r, cmp.Or(e.Request.Host, d.Registry))
	case "ChartPushed", "ChartDeleted":
		r.ignore(NotImage, "a chart")
	case "SubscriptionValidationEvent":
		return validate(g.Data, r)
	default:
		r.ignore(Foreign, "foreign event %q", clip(kind))
	}
	return nil
}

func validate(data []byte, r *Result) error {
	var v struct {
		ValidationCode string `json:"validationCode"`
	}
	if err := unmarshal(data, &v); err != nil {
		return err
	}
	if v.ValidationCode == "" || len(v.ValidationCode) > maxText {
		return fmt.Errorf("a handshake without a code, or with one of more than %d bytes", maxText)
	}
	reply, err := json.Marshal(map[string]string{"validationResponse": v.ValidationCode})
	if err != nil {
		return err
	}
	r.Reply = reply
	r.ignore(Handshake, "Event Grid's handshake, answered")
	return nil
}
