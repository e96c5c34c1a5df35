package config

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

// documented is what a page says of a setting.
type documented struct{ page, value string }

// tablesOf returns the settings in a page's tables "| key | default | |", by
// their whole key. Where the keys are those of one of several tables, or of one
// that has a page of its own, the paragraph before names that.
func tablesOf(t *testing.T, pages ...string) map[string]documented {
	t.Helper()
	scopes := map[string]string{
		"`[receiver.NAME]`": "receiver.NAME.", "`[poll.NAME]`": "poll.NAME.", "`[verify.NAME]`": "verify.NAME.", "`[[rule]]`": "rule.N.",
		"In `[prefetch]`": "prefetch.",
	}
	out := map[string]documented{}
	for _, page := range pages {
		text, err := os.ReadFile("../docs/" + page)
		if err != nil {
			t.Fatal(err)
		}
		before := ""
		for block := range strings.SplitSeq(string(text), "\n\n") {
			rows, ok := strings.CutPrefix(strings.TrimSpace(block), "| key | default | |\n|---|---|---|\n")
			if !ok {
				before = block
				continue
			}
			scope := ""
			for name, prefix := range scopes {
				if strings.Contains(before, name) {
					scope = prefix
				}
			}
			for row := range strings.SplitSeq(rows, "\n") {
				cells := strings.SplitN(row, "|", 4)
				if len(cells) != 4 || len(strings.TrimSpace(strings.Trim(cells[3], "|"))) < 5 {
					t.Errorf("%s: a row that does not say what the setting is: %s", page, row)
					continue
				}
				key := scope + strings.Trim(cells[1], " `")
				if d, twice := out[key]; twice {
					t.Errorf("%s is in %s and in %s", key, d.page, page)
				}
				out[key] = documented{page, strings.TrimSpace(cells[2])}
			}
		}
	}
	return out
}

// sameSettings fails where the pages lack a setting, have one that there is not,
// or say another default.
func sameSettings(t *testing.T, fields []Field, pages ...string) {
	t.Helper()
	said := tablesOf(t, pages...)
	for _, f := range fields {
		d, ok := said[f.Key]
		delete(said, f.Key)
		switch value, isValue := code(d.value); {
		case !ok:
			t.Errorf("%s is in no table of %q", f.Key, pages)
		case slices.Contains([]string{"", "0", "0s", "false"}, f.Default):
			// Nothing that had to be said, and where something is said, what it amounts to.
		case !isValue || value != f.Default:
			t.Errorf("%s: %s says %q, and the default is %q", f.Key, d.page, d.value, f.Default)
		}
		if len(f.Usage) < 10 {
			t.Errorf("%s: no comment", f.Key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(said)) {
		t.Errorf("%s has %s, and there is no such setting", said[key].page, key)
	}
}

// code returns what stands between backquotes, as Set reads it.
func code(cell string) (string, bool) {
	inner, ok := strings.CutPrefix(cell, "`")
	inner, closed := strings.CutSuffix(inner, "`")
	return strings.Trim(inner, `"`), ok && closed
}

func TestEverySettingOfTheDaemonIsDocumented(t *testing.T) {
	sameSettings(t, Fields(), "configuration.md", "prefetch.md")
}

func TestEverySettingOfTheNotifierIsDocumented(t *testing.T) {
	fields := slices.Concat(notifierFields(), receiverFields("NAME"), pollFields("NAME"), verifyFields("NAME"), ruleFields("N"))
	sameSettings(t, fields, "notifier.md", "notifier-rules.md")
}

func TestEveryTypeOfWebhookHasAPage(t *testing.T) {
	b, err := os.ReadFile("../docs/notifier.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(receiverTypes)) {
		page, err := os.ReadFile("../docs/registries/" + name + ".md")
		if err != nil || !strings.Contains(string(page), "type = \""+name+"\"") {
			t.Errorf("type %s has no page in docs/registries, or it does not say how to set it: %v", name, err)
		}
		if !strings.Contains(string(b), "(registries/"+name+".md)") {
			t.Errorf("docs/notifier.md does not lead to the page of type %s", name)
		}
	}
}
