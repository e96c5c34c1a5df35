package rules

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/imagewolf/imagewolf/notifier/event"
)

// Step is what one rule says about an event.
type Step struct {
	Rule    string
	Matches bool
	Why     string
}

// Explanation is how an event is decided.
type Explanation struct {
	Event    event.Event
	Steps    []Step // of the rules that were looked at, the last of which decided if it matches
	Rest     int    // rules after it, that were not looked at
	Decision Decision
}

// Explain decides as Decide does, but waits for nothing: an image without a
// signature is refused at once. The error is one that may pass.
func (r *Rules) Explain(ctx context.Context, e event.Event) (Explanation, error) {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	x := Explanation{Event: e}
	var err error
	x.Decision, err = r.decide(ctx, e, func(event.Event, time.Duration) bool { return false }, func(s Step) { x.Steps = append(x.Steps, s) })
	x.Rest = len(r.rules) - len(x.Steps)
	return x, err
}

// String writes it for people, a line for each rule.
func (x Explanation) String() string {
	var b strings.Builder
	fmt.Fprintln(&b, x.Event.Image())
	for _, s := range x.Steps {
		mark := "-"
		if s.Matches {
			mark = "+"
		}
		fmt.Fprintf(&b, "  %s rule %s: %s\n", mark, s.Rule, s.Why)
	}
	if x.Rest > 0 && len(x.Steps) > 0 {
		fmt.Fprintf(&b, "    %d further rules are not looked at\n", x.Rest)
	}
	if x.Decision.Kind != "" {
		fmt.Fprintf(&b, "  %s: %s\n", x.Decision.Kind, x.Decision.Reason)
	}
	return b.String()
}
