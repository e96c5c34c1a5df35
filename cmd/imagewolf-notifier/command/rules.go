package command

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/imagewolf/imagewolf/config"
	"github.com/imagewolf/imagewolf/internal/program"
	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/rules"
)

const (
	receiverFlag = "receiver"
	headerFlag   = "header"
)

func newRules(cfg config.Notifier, log *slog.Logger) (*rules.Rules, error) {
	return rules.New(cfg, rules.Options{Log: log})
}

func rulesCommand() *cli.Command {
	return &cli.Command{
		Name: "rules", Usage: "try the rules",
		Subcommands: []*cli.Command{{
			Name: "test", ArgsUsage: "EVENT.json",
			Usage: "say which rule matches an event, and what would happen; nothing does",
			Description: "EVENT.json is {\"image\": \"HOST/REPOSITORY:TAG\"}, or, with --receiver, a webhook's body as the registry sends it.\n" +
				"\"-\" reads standard input. Registries are asked where a rule needs it, nodes are not.",
			Flags: append(configFlags(),
				&cli.StringFlag{Name: receiverFlag, Usage: "read the event as the receiver `NAME` of the settings does"},
				&cli.StringSliceFlag{Name: headerFlag, Usage: "with --receiver: a `HEADER` of the webhook, such as 'X-GitHub-Event: package'; may be given several times"},
			),
			Action: testRules,
		}},
	}
}

func testRules(c *cli.Context) error {
	if c.NArg() != 1 {
		return program.Usage(c, errors.New("give one file with an event, after the flags"))
	}
	cfg, err := load(c)
	if err != nil {
		return err
	}
	decide, err := newRules(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	body, err := readEvent(c, cfg)
	if err != nil {
		return err
	}
	result, err := decode(c, cfg, body)
	if err != nil {
		return err
	}
	for _, i := range result.Ignored {
		more := ""
		if i.More > 0 {
			more = fmt.Sprintf(" (and %d more)", i.More)
		}
		if _, err := fmt.Fprintf(c.App.Writer, "%s: %s%s\n", i.Kind, i.Reason, more); err != nil {
			return err
		}
	}
	for _, e := range result.Events {
		x, err := decide.Explain(c.Context, e)
		if _, printed := io.WriteString(c.App.Writer, x.String()); printed != nil {
			return printed
		}
		if err != nil {
			return fmt.Errorf("%s cannot be decided now, and would be tried again: %w", e.Image(), err)
		}
	}
	return nil
}

func readEvent(c *cli.Context, cfg config.Notifier) ([]byte, error) {
	in := c.App.Reader
	if path := c.Args().First(); path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close() //nolint:errcheck // only read
		in = f
	}
	body, err := io.ReadAll(io.LimitReader(in, cfg.MaxBody.Bytes()+1))
	if err != nil {
		return nil, err
	}
	if int64(len(body)) > cfg.MaxBody.Bytes() {
		return nil, fmt.Errorf("more than %s (max_body)", cfg.MaxBody)
	}
	return body, nil
}

// decode reads the event as the receiver does that is named, or in our own form.
func decode(c *cli.Context, cfg config.Notifier, body []byte) (event.Result, error) {
	d, kind := event.Delivery{Body: body, Header: http.Header{}, MaxEvents: cfg.Queue.MaxPerBody()}, "generic"
	if name := c.String(receiverFlag); name != "" {
		r, ok := cfg.Receiver[name]
		if !ok {
			return event.Result{}, fmt.Errorf("--%s: the settings have no [receiver.%s]", receiverFlag, name)
		}
		kind, d.Registry, d.Topic = r.Type, r.Registry, r.TopicARN
	}
	for _, h := range c.StringSlice(headerFlag) {
		name, value, ok := strings.Cut(h, ":")
		if !ok {
			return event.Result{}, fmt.Errorf("--%s: %q: write NAME: VALUE", headerFlag, h)
		}
		d.Header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	r, err := event.Decode(kind, d)
	if err != nil {
		return event.Result{}, fmt.Errorf("%s is not what type %s sends: %w", c.Args().First(), kind, err)
	}
	return r, nil
}
