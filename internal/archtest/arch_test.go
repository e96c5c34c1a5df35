// Package archtest holds the tests of the shape of the source tree: who may
// import whom, what every package must say of itself, and how long things may
// get. It has no code of its own.
package archtest

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	root     = "../.."
	module   = "github.com/imagewolf/imagewolf/"
	maxFile  = 700
	maxFunc  = 100
	engine   = "github.com/anacrolix/torrent"
	onlyUser = "swarm" // of the engine

	prometheus = "github.com/prometheus"
)

// onlyTellers are the packages that tell Prometheus what was counted.
var onlyTellers = []string{"node/metrics", "notifier/metrics"}

// allowed says which parts of the tree each part may import; every part may
// import its own packages. Imports run one way: cmd -> node -> the middle ->
// api, config. The middle's packages do not know each other: node connects
// them.
var allowed = map[string][]string{
	"cmd/imagewolf":     {"node", "cluster", "config", "api", "internal/build", "internal/program"}, // api: the command line asks nodes, through api/nodeapi
	"node":              {"proxy", "plugin", "swarm", "tracker", "cluster", "prefetch", "api", "config", "internal/serve", "internal/systemd"},
	"proxy":             {"api", "config", "internal/serve"},
	"plugin":            {"api", "config", "internal/database"},
	"swarm":             {"api", "config"},
	"tracker":           {"api", "config"},
	"cluster":           {"api", "config"},
	"prefetch":          {"api", "config", "internal/database"},
	"notifier":          {"api", "config", "internal/serve", "internal/systemd"},
	"api":               {},
	"config":            {},
	"internal/archtest": {},

	"cmd/imagewolf-notifier": {"notifier", "config", "api", "internal/build", "internal/program"},
	"internal/build":         {},
	"internal/database":      {},
	"internal/program":       {"internal/build"},
	"internal/serve":         {},
	"internal/systemd":       {},
}

// source is one parsed file of the product.
type source struct {
	path      string // slash-separated, from the root of the tree
	test      bool
	generated bool
	lines     int
	fset      *token.FileSet
	file      *ast.File
}

// part returns the part of the tree that a package's directory belongs to.
func part(dir string) string {
	for p := range allowed {
		if dir == p || strings.HasPrefix(dir, p+"/") {
			return p
		}
	}
	return ""
}

// sources parses the Go files of this module: directories with a go.mod of
// their own are other modules.
func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			if path != root && (err == nil || strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		code, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, code, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		out = append(out, source{
			path: filepath.ToSlash(rel), test: strings.HasSuffix(path, "_test.go"), generated: ast.IsGenerated(file),
			lines: bytes.Count(code, []byte("\n")), fset: fset, file: file,
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 20 {
		t.Fatalf("only %d files found: the tests here look at the wrong place", len(out))
	}
	return out
}

func TestImportsRunOneWay(t *testing.T) {
	for _, s := range sources(t) {
		dir := filepath.ToSlash(filepath.Dir(s.path))
		from := part(dir)
		if from == "" {
			t.Errorf("%s: folder %s has no place in the house: give it one in this test and in CONTRIBUTING.md", s.path, dir)
			continue
		}
		for _, i := range s.file.Imports {
			path, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			if (path == engine || strings.HasPrefix(path, engine+"/")) && from != onlyUser {
				t.Errorf("%s imports %s: only %s may", s.path, path, onlyUser)
			}
			if strings.HasPrefix(path, prometheus+"/") && !slices.Contains(onlyTellers, dir) {
				t.Errorf("%s imports %s: only %s may", s.path, path, onlyTellers)
			}
			own, ok := strings.CutPrefix(path, module)
			if !ok || s.test {
				continue
			}
			if to := part(own); to != from && !slices.Contains(allowed[from], to) {
				t.Errorf("%s imports %s: %s may import %q only", s.path, own, from, allowed[from])
			}
		}
	}
}

func TestEveryPackageSaysOnceWhatItIsFor(t *testing.T) {
	docs := map[string][]string{}
	for _, s := range sources(t) {
		dir := filepath.Dir(s.path)
		if _, seen := docs[dir]; !seen && !s.generated {
			docs[dir] = nil
		}
		if s.file.Doc != nil && !s.generated && !strings.HasSuffix(s.file.Name.Name, "_test") {
			docs[dir] = append(docs[dir], s.path)
		}
	}
	for dir, files := range docs {
		if len(files) != 1 {
			t.Errorf("%s has %d package comments (%q), and should have one", dir, len(files), files)
		}
	}
}

func TestNothingIsTooLong(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || s.generated {
			continue
		}
		if s.lines > maxFile {
			t.Errorf("%s has %d lines, at most %d", s.path, s.lines, maxFile)
		}
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := s.fset.Position(f.End()).Line - s.fset.Position(f.Pos()).Line + 1; n > maxFunc {
				t.Errorf("%s: %s has %d lines, at most %d", s.path, f.Name.Name, n, maxFunc)
			}
		}
	}
}

func TestMainIsThin(t *testing.T) {
	for _, s := range sources(t) {
		if filepath.Base(s.path) == "main.go" && strings.HasPrefix(s.path, "cmd/") && s.lines >= 30 {
			t.Errorf("%s has %d lines and should have less than 30: put the rest where it can be tested", s.path, s.lines)
		}
	}
}

// Unit tests sleep in virtual time only.
func TestNoUnitTestWaitsForRealTime(t *testing.T) {
	all, virtual := sources(t), map[string]bool{} // by directory: a bubble may be made by a helper of another file
	for _, s := range all {
		if slices.ContainsFunc(s.file.Imports, func(i *ast.ImportSpec) bool { return i.Path.Value == `"testing/synctest"` }) {
			virtual[filepath.Dir(s.path)] = true
		}
	}
	for _, s := range all {
		if !s.test || virtual[filepath.Dir(s.path)] {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == "time" && sel.Sel.Name == "Sleep" {
				t.Errorf("%s:%d sleeps: wait for an event, or use testing/synctest", s.path, s.fset.Position(n.Pos()).Line)
			}
			return true
		})
	}
}
