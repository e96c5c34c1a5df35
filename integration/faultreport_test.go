package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imagewolf/imagewolf/integration/harness"
)

// faultRecord is one line of the report.
type faultRecord struct {
	Fault          string  `json:"fault"`
	OK             bool    `json:"ok"`
	Seconds        float64 `json:"seconds"`
	SecondsWithout float64 `json:"seconds_without"`
	RegistryCopies float64 `json:"registry_copies"`
	Note           string  `json:"note"`

	over bool // the test has ended
}

// unmeasured is a figure that nobody takes. The report has a zero in its place, and
// the note says what that means.
const unmeasured = -1

// report is what FAULTS_JSON gets. Scenarios do not run in parallel.
var report []*faultRecord

// record adds a line to the report, for the caller to fill. It is there however the
// test ends, the whole process even, and is right unless that fails. A fault with
// containerd 1.7 is one of its own.
func record(t *testing.T, fault, version string) *faultRecord {
	t.Helper()
	if version != harness.V2 {
		fault += ", containerd " + version
	}
	r := &faultRecord{Fault: fault, Seconds: unmeasured, SecondsWithout: unmeasured, RegistryCopies: unmeasured}
	report = append(report, r)
	must(t, writeReport(os.Getenv("FAULTS_JSON")))
	t.Cleanup(func() {
		r.OK, r.over = !t.Failed(), true
		if err := writeReport(os.Getenv("FAULTS_JSON")); err != nil {
			t.Error(err)
		}
	})
	return r
}

// say adds to the line's note.
func (r *faultRecord) say(format string, args ...any) {
	if r.Note != "" {
		r.Note += "; "
	}
	r.Note += fmt.Sprintf(format, args...)
}

// told is the line as the report has it.
func (r faultRecord) told() faultRecord {
	var missing []string
	for _, f := range []struct {
		name  string
		value *float64
	}{{"seconds", &r.Seconds}, {"seconds_without", &r.SecondsWithout}, {"registry_copies", &r.RegistryCopies}} {
		if *f.value == unmeasured {
			*f.value = 0
			missing = append(missing, f.name)
		}
	}
	if len(missing) > 0 {
		r.say("not measured: %s", strings.Join(missing, ", "))
	}
	if !r.over {
		r.say("the test did not end")
	}
	return r
}

// writeReport writes the report as far as it goes to a file, in one step; "" for
// none.
func writeReport(file string) error {
	if file == "" {
		return nil
	}
	told := make([]faultRecord, len(report))
	for i, r := range report {
		told[i] = r.told()
	}
	data, err := json.MarshalIndent(told, "", "  ")
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(file+".new", append(data, '\n'), 0o644), os.Rename(file+".new", file))
}

// timed returns what fills in how long something took until then.
func timed(line *faultRecord) func() {
	began := time.Now()
	return func() { line.Seconds = time.Since(began).Seconds() }
}

// copies is how many copies of an image the registry has sent since the last Reset.
func copies(img *harness.Image) float64 {
	return float64(registry.Bytes("")) / float64(img.Bytes())
}

// undisturbed is how many seconds nodes need for an image like the one of a test
// when nothing fails. It is found out only where the figures are kept.
func undisturbed(ctx context.Context, t *testing.T, nodes []*harness.Node, rate int64, sizes ...int64) float64 {
	t.Helper()
	if os.Getenv("FAULTS_JSON") == "" {
		return unmeasured
	}
	return plainPull(ctx, t, nodes, rate, sizes...)
}

// plainPull is how many seconds nodes need for a new image when nothing fails.
func plainPull(ctx context.Context, t *testing.T, nodes []*harness.Node, rate int64, sizes ...int64) float64 {
	t.Helper()
	img := image(ctx, t, sizes...)
	registry.Behave(harness.Behavior{Rate: rate})
	took, err := harness.PullOn(ctx, nodes, "undisturbed", img.Ref)
	must(t, err)
	registry.Behave(harness.Behavior{})
	registry.Reset()
	return slices.Max(took).Seconds()
}
