package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/agnivade/levenshtein"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxFile bounds what is read of a configuration file, in bytes.
const maxFile = 1 << 20

// Sources says where settings come from. Each overrides those before it:
// defaults, File, Env, Flags.
type Sources struct {
	File     string                           // path; "" reads no file
	Optional bool                             // File may be absent
	Env      func(key string) (string, bool)  // such as os.LookupEnv; nil reads no environment; an empty variable counts as not set
	Flags    func(flag string) (string, bool) // value of a flag that was given; nil: none were
}

// Load reads the settings. Its error, made with errors.Join, names everything
// in the sources that cannot be read as a setting, each with its place. It does
// not judge the values: see Validate.
func Load(s Sources) (Config, error) {
	c := Default()
	var errs []error
	if s.File != "" {
		b, err := readFile(s.File)
		switch {
		case err == nil:
			errs = append(errs, c.decode(s.File, b)...)
		case !s.Optional || !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, unread{err})
		}
	}
	errs = append(errs, s.overlay(Fields(), reflect.ValueOf(&c).Elem())...)
	return c, errors.Join(errs...)
}

// unread is why nothing of a file was read.
type unread struct{ error }

// Unwrap returns the reason.
func (u unread) Unwrap() error { return u.error }

// Unread reports whether an error of Load or LoadNotifier is that nothing of the file was read, so that
// Validate would miss what may well be in it.
func Unread(err error) bool { return errors.As(err, new(unread)) }

// overlay gives the fields of root what the environment and the flags say.
func (s Sources) overlay(fields []Field, root reflect.Value) []error {
	var errs []error
	for _, f := range fields {
		if s.Env != nil {
			if v, ok := s.Env(f.Env); ok && v != "" {
				errs = append(errs, prefixed("environment variable "+f.Env, f.set(root, v)))
			}
		}
		if s.Flags != nil && f.Flag != "" {
			if v, ok := s.Flags(f.Flag); ok {
				errs = append(errs, prefixed("flag --"+f.Flag, f.set(root, v)))
			}
		}
	}
	return errs
}

func prefixed(where string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", where, err)
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading: nothing can be lost
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("%s: more than %d bytes: this is no configuration file", path, maxFile)
	}
	return b, nil
}

// decode applies the file's settings to c.
func (c *Config) decode(name string, doc []byte) []error {
	root := reflect.ValueOf(c).Elem()
	return schema{
		tables: root.Type(),
		find: func(key toml.Key) (Field, reflect.Value, bool) {
			f, ok := fieldFor(key)
			return f, root, ok
		},
		known: Fields,
		help:  "'imagewolf config default' prints every key there is",
	}.decode(name, doc, new(map[string]any))
}

// schema is what a file may say.
type schema struct {
	tables reflect.Type                                // the struct of settings
	find   func(toml.Key) (Field, reflect.Value, bool) // the setting that a key belongs to, and the struct it is a field of
	known  func() []Field                              // for suggestions
	help   string                                      // where to look for keys
}

// decode applies a file's settings, and leaves what it read in values. The TOML
// decoder stops at the first value of a wrong type; an operator wants to hear of
// all of them. So it is asked twice: once for the bare values, and once,
// strictly, into tables that have no fields, so that it reports every key there
// is with its position.
func (s schema) decode(name string, doc []byte, values *map[string]any) []error {
	if err := toml.Unmarshal(doc, values); err != nil {
		return []error{unread{locate(name, err)}}
	}
	rows, err := s.headers(name, doc)
	if err != nil {
		clear(*values)
		return []error{unread{err}}
	}
	s.number(*values)
	err = toml.NewDecoder(bytes.NewReader(doc)).DisallowUnknownFields().Decode(bareTables(s.tables))
	if err == nil {
		return nil
	}
	var keys *toml.StrictMissingError
	if !errors.As(err, &keys) {
		var at *toml.DecodeError
		if errors.As(err, &at) { // a table is given a value
			row, col := at.Position()
			key := strings.Join(at.Key(), ".")
			err = fmt.Errorf("%s:%d:%d: %s: must be a table, written [%s], not %s", name, row, col, key, key, kindOf(lookup(*values, at.Key())))
		}
		return []error{err}
	}
	var errs []error
	done := map[string]bool{}
	for _, k := range keys.Errors {
		row, col := k.Position()
		where := fmt.Sprintf("%s:%d:%d", name, row, col)
		key := k.Key()
		if s.isArray(key[0]) {
			key = numbered(key, row, rows)
		}
		f, root, ok := s.find(key)
		if !ok {
			errs = append(errs, fmt.Errorf("%s: unknown key %s%s", where, strings.Join(key, "."), s.suggestion(key)))
			continue
		}
		if !done[f.Key] { // labels written as a table are reported once per label
			done[f.Key] = true
			path := key[:min(len(key), strings.Count(f.Key, ".")+1)]
			errs = append(errs, prefixed(where+": "+f.Key, f.setTOML(root, lookup(*values, path))))
		}
	}
	return errs
}

// bareTables returns a pointer to a struct with the tables of a struct of
// settings, and no fields.
func bareTables(of reflect.Type) any {
	var tables []reflect.StructField
	for sf := range of.Fields() {
		bare := reflect.StructField{Name: sf.Name, Tag: sf.Tag}
		switch {
		case sf.Type.Kind() == reflect.Struct:
			bare.Type = reflect.TypeFor[struct{}]()
		case isTableOfTables(sf.Type):
			bare.Type = reflect.TypeFor[map[string]struct{}]()
		case isArrayOfTables(sf.Type):
			bare.Type = reflect.TypeFor[[]struct{}]()
		default:
			continue
		}
		tables = append(tables, bare)
	}
	return reflect.New(reflect.StructOf(tables)).Interface()
}

// isArray tells whether the name is one of an array of tables.
func (s schema) isArray(name string) bool {
	for sf := range s.tables.Fields() {
		if tag, _, _ := strings.Cut(sf.Tag.Get("toml"), ","); tag == name {
			return isArrayOfTables(sf.Type)
		}
	}
	return false
}

// number makes tables with numbers for names, from "1", of the arrays of tables,
// so that each of their values has a key of its own.
func (s schema) number(values map[string]any) {
	for name, v := range values {
		list, ok := v.([]any)
		if !ok || !s.isArray(name) {
			continue
		}
		tables := map[string]any{}
		for i, t := range list {
			tables[strconv.Itoa(i+1)] = t
		}
		values[name] = tables
	}
}

// headers returns in which rows the tables of each array begin, such as those of
// [[rule]], and fails where one is written in another way, for then its values
// could not be told apart.
func (s schema) headers(name string, doc []byte) (map[string][]int, error) {
	rows := map[string][]int{}
	var p unstable.Parser
	p.Reset(doc)
	for top := true; p.NextExpression(); {
		e := p.Expression()
		if e.Kind == unstable.Comment || e.Kind == unstable.KeyValue && !top {
			continue
		}
		top = top && e.Kind == unstable.KeyValue
		key := e.Key()
		if !key.Next() || !s.isArray(string(key.Node().Data)) {
			continue
		}
		array, at := string(key.Node().Data), p.Shape(key.Node().Raw).Start
		switch {
		case e.Kind == unstable.ArrayTable && key.IsLast():
			rows[array] = append(rows[array], at.Line)
		case len(rows[array]) == 0:
			return nil, fmt.Errorf("%s:%d:%d: %s: must be tables, each written [[%s]]", name, at.Line, at.Column, array, array)
		}
	}
	return rows, nil
}

// numbered puts the number of a table into the key of a value that stands in the
// given row.
func numbered(key toml.Key, row int, rows map[string][]int) toml.Key {
	number := 0
	for _, start := range rows[key[0]] {
		if start <= row {
			number++
		}
	}
	return slices.Insert(slices.Clone(key), 1, strconv.Itoa(number))
}

func locate(name string, err error) error {
	var at *toml.DecodeError
	if !errors.As(err, &at) {
		return fmt.Errorf("%s: %w", name, err)
	}
	row, col := at.Position()
	return fmt.Errorf("%s:%d:%d: %w", name, row, col, err)
}

// fieldFor finds the setting that a key of the file belongs to: of that name,
// or a label within it.
func fieldFor(key toml.Key) (Field, bool) {
	name := strings.Join(key, ".")
	for _, f := range Fields() {
		if name == f.Key || strings.HasPrefix(name, f.Key+".") && f.Key == "cluster.labels" {
			return f, true
		}
	}
	return Field{}, false
}

func lookup(values map[string]any, key []string) any {
	var at any = values
	for _, name := range key {
		table, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = table[name]
	}
	return at
}

// suggestion names what was probably meant by an unknown key: the same key in
// another table, or else the key or table that is a few letters away.
func (s schema) suggestion(key toml.Key) string {
	full, last := strings.Join(key, "."), key[len(key)-1]
	if len(full) > 128 { // the distance costs the product of both lengths
		return ""
	}
	best, least := "", len(last)/3+2
	try := func(known string) bool {
		name := known[strings.LastIndexByte(known, '.')+1:]
		d := min(levenshtein.ComputeDistance(full, known), 1+levenshtein.ComputeDistance(last, name))
		if name == last {
			d = 0
		}
		if d < least {
			best, least = known, d
		}
		return d == 0
	}
	for _, f := range s.known() {
		table, _, nested := strings.Cut(f.Key, ".")
		if try(f.Key) || nested && try(table) {
			break
		}
	}
	if best == "" {
		return "; " + s.help
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}
