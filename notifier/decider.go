package notifier

import (
	"context"

	"github.com/imagewolf/imagewolf/notifier/event"
	"github.com/imagewolf/imagewolf/notifier/rules"
	"github.com/imagewolf/imagewolf/notifier/work"
)

// Decider has rules decide for package work.
type Decider struct{ Rules *rules.Rules }

var _ work.Rules = Decider{}

// Decide implements work.Rules.
func (d Decider) Decide(ctx context.Context, e event.Event) (work.Decision, error) {
	decided, err := d.Rules.Decide(ctx, e)
	return work.Decision(decided), err
}
