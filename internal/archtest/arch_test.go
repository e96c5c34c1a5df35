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
	"prefetch":          {"api", "config", "internal/credentials", "internal/database"},
	"notifier":          {"api", "config", "internal/credentials", "internal/serve", "internal/systemd"},
	"api":               {},
	"config":            {},
	"internal/archtest": {},

	"cmd/imagewolf-notifier": {"notifier", "config", "api", "internal/build", "internal/program"},
	"internal/build":         {},
	"internal/credentials":   {},
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
		if s.generated {
			continue
		}
		if s.lines > maxFile {
			t.Errorf("%s has %d lines, at most %d", s.path, s.lines, maxFile)
		}
		if s.test {
			continue // a table of cases may be long
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

// Unit tests sleep in virtual time only: in functions that make a bubble with
// testing/synctest, or that only such functions use. Benchmarks measure real time
// and may.
func TestNoUnitTestWaitsForRealTime(t *testing.T) {
	packages := map[string][]source{}
	for _, s := range sources(t) {
		if s.test {
			packages[filepath.Dir(s.path)] = append(packages[filepath.Dir(s.path)], s)
		}
	}
	for _, files := range packages {
		for _, at := range realSleeps(files) {
			t.Errorf("%s sleeps: wait for an event, or use testing/synctest", at)
		}
	}
}

// The rule above finds what it is to find, and nothing else.
func TestRealSleepsAreFound(t *testing.T) {
	const code = `package p
func TestReal(t *testing.T) { time.Sleep(1) }
func TestReached(t *testing.T) { helper(); x := late{} }
func helper() { deeper() }
func deeper() { time.Sleep(1) }
type late struct{}
func (*late) Read() { time.Sleep(1) }
var table = []func(){ func() { time.Sleep(1) } }
func TestBubble(t *testing.T) { synctest.Test(t, func(t *testing.T) { time.Sleep(1); virtual(); x := never{} }) }
func TestWrapped(t *testing.T) { bubble(t, func() { time.Sleep(1); virtual() }) }
func bubble(t *testing.T, f func()) { synctest.Test(t, func(*testing.T) { f() }) }
func virtual() { time.Sleep(1) }
type never struct{}
func (*never) Read() { time.Sleep(1) }
func BenchmarkReal(b *testing.B) { time.Sleep(1) }
`
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "p_test.go", code, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := realSleeps([]source{{path: "p_test.go", test: true, fset: fset, file: file}})
	slices.Sort(got)
	if want := []string{"p_test.go:2", "p_test.go:5", "p_test.go:7", "p_test.go:8"}; !slices.Equal(got, want) {
		t.Errorf("found %v, want %v", got, want)
	}
}

// realSleeps returns where the test files of one package call time.Sleep in real
// time: in tests that make no bubble, in the package's variables, and in what these
// name, and so on. A method is named with its type.
func realSleeps(files []source) []string {
	type place struct {
		ast.Node
		source
	}
	named := map[string][]place{} // what a name stands for
	bubbles := map[string]bool{}  // functions that run another in a bubble
	var todo []place
	for _, s := range files {
		for _, d := range s.file.Decls {
			for _, n := range parts(d) {
				name := nameOf(n)
				if name == "" {
					todo = append(todo, place{n, s})
					continue
				}
				named[name] = append(named[name], place{n, s})
				bubbles[name] = bubbles[name] || mentions(n, func(n ast.Node) bool { return isSelector(n, "synctest", "Test") })
			}
		}
	}
	var found []string
	for len(todo) > 0 {
		p := todo[0]
		todo = todo[1:]
		if mentions(p.Node, func(n ast.Node) bool {
			id, ok := n.(*ast.Ident)
			return isSelector(n, "synctest", "Test") || ok && bubbles[id.Name]
		}) {
			continue
		}
		ast.Inspect(p.Node, func(n ast.Node) bool {
			if isSelector(n, "time", "Sleep") {
				found = append(found, p.path+":"+strconv.Itoa(p.fset.Position(n.Pos()).Line))
			}
			if id, ok := n.(*ast.Ident); ok {
				todo = append(todo, named[id.Name]...)
				delete(named, id.Name)
			}
			return true
		})
	}
	return found
}

// parts returns a function's declaration, or each thing that others declare.
func parts(d ast.Decl) []ast.Node {
	g, ok := d.(*ast.GenDecl)
	if !ok {
		return []ast.Node{d}
	}
	var all []ast.Node
	for _, s := range g.Specs {
		all = append(all, s)
	}
	return all
}

// nameOf returns what must be named for something to be used: a function's name, a
// type's, a method's type's; "" for what is used without that.
func nameOf(n ast.Node) string {
	switch n := n.(type) {
	case *ast.TypeSpec:
		return n.Name.Name
	case *ast.FuncDecl:
		if n.Recv == nil {
			for _, kind := range []string{"Test", "Fuzz", "Example", "init"} {
				if strings.HasPrefix(n.Name.Name, kind) {
					return ""
				}
			}
			return n.Name.Name
		}
		name := ""
		ast.Inspect(n.Recv.List[0].Type, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok && name == "" {
				name = id.Name
			}
			return name == ""
		})
		return name
	}
	return ""
}

// mentions says whether anything in n is as f says.
func mentions(n ast.Node, f func(ast.Node) bool) bool {
	found := false
	ast.Inspect(n, func(n ast.Node) bool {
		found = found || n != nil && f(n)
		return !found
	})
	return found
}

// isSelector says whether an expression is a name of a package.
func isSelector(n ast.Node, pkg, name string) bool {
	sel, ok := n.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != name {
		return false
	}
	x, ok := sel.X.(*ast.Ident)
	return ok && x.Name == pkg
}
