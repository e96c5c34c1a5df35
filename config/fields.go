package config

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// envPrefix starts the name of every environment variable that is read.
const envPrefix = "IMAGEWOLF_"

// Field is one setting as the operator meets it: in the file, in the
// environment and among the flags.
type Field struct {
	Key     string // in the file, with its table: "cluster.join"
	Env     string // environment variable: "IMAGEWOLF_CLUSTER_JOIN"
	Flag    string // flag without dashes: "cluster-join"; "" if it must not be one
	Usage   string // first sentence of what is said in the example file
	Default string // as Set reads it
	Bool    bool   // a switch: a flag without value means true

	index []int // the way from Config to the field, for reflect
}

// Fields returns every setting, in the order of the file.
func Fields() []Field {
	def := Default()
	return fieldsOf(reflect.ValueOf(def), "", nil)
}

func fieldsOf(v reflect.Value, prefix string, index []int) []Field {
	var out []Field
	for i := range v.NumField() {
		sf, at := v.Type().Field(i), append(append([]int{}, index...), i)
		name, _, _ := strings.Cut(sf.Tag.Get("toml"), ",")
		key := prefix + name
		switch {
		case v.Field(i).Kind() == reflect.Struct:
			out = append(out, fieldsOf(v.Field(i), key+".", at)...)
			continue
		case isTableOfTables(sf.Type), isArrayOfTables(sf.Type):
			continue
		}
		flag := sf.Tag.Get("flag")
		if flag == "" {
			flag = strings.NewReplacer(".", "-", "_", "-").Replace(key)
		}
		f := Field{
			Key: key, Flag: flag, Env: envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_")),
			Usage: firstSentence(sf.Tag.Get("comment")), Default: format(v.Field(i)),
			Bool: v.Field(i).Kind() == reflect.Bool, index: at,
		}
		if sf.Tag.Get("secret") != "" {
			f.Flag = ""
		}
		out = append(out, f)
	}
	return out
}

// isTableOfTables tells a map of named tables, which holds settings but is none.
func isTableOfTables(t reflect.Type) bool {
	return t.Kind() == reflect.Map && t.Elem().Kind() == reflect.Struct
}

// isArrayOfTables tells a list of tables, which holds settings but is none.
func isArrayOfTables(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct
}

func firstSentence(comment string) string {
	s, _, _ := strings.Cut(strings.ReplaceAll(comment, "\n", " "), ". ")
	return strings.TrimSuffix(s, ".")
}

// Set gives the setting a value written as text, as in the environment or on
// the command line: lists are separated by commas, labels are "key=value".
func (f Field) Set(c *Config, text string) error {
	return f.set(reflect.ValueOf(c).Elem(), text)
}

// set is Set for any struct of settings that the field is of.
func (f Field) set(root reflect.Value, text string) error {
	target := root.FieldByIndex(f.index)
	switch target.Interface().(type) {
	case int:
		v, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q is no whole number", text)
		}
		target.SetInt(int64(v))
		return nil
	case bool:
		v, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q is neither true nor false", text)
		}
		target.SetBool(v)
		return nil
	case []string:
		target.Set(reflect.ValueOf(splitList(text)))
		return nil
	case map[string]string:
		labels := map[string]string{}
		for _, pair := range splitList(text) {
			k, v, ok := strings.Cut(pair, "=")
			if !ok {
				return fmt.Errorf("%q is no label: write key=value", pair)
			}
			labels[k] = v
		}
		target.Set(reflect.ValueOf(labels))
		return nil
	}
	return setText(target, text)
}

func setText(target reflect.Value, text string) error {
	if u, ok := target.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	target.SetString(text)
	return nil
}

func splitList(text string) []string {
	out := []string{}
	for s := range strings.SplitSeq(text, ",") {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// setTOML gives the setting a value as the TOML decoder found it.
func (f Field) setTOML(root reflect.Value, value any) error {
	target := root.FieldByIndex(f.index)
	switch target.Interface().(type) {
	case int:
		v, ok := value.(int64)
		if !ok {
			return fmt.Errorf("must be a whole number, not %s", kindOf(value))
		}
		target.SetInt(v)
		return nil
	case bool:
		v, ok := value.(bool)
		if !ok {
			return fmt.Errorf("must be true or false, not %s", kindOf(value))
		}
		target.SetBool(v)
		return nil
	case []string:
		return setList(target, value)
	case map[string]string:
		return setMap(target, value)
	case Size, Rate:
		if n, ok := value.(int64); ok {
			return setText(target, strconv.FormatInt(n, 10))
		}
	}
	s, ok := value.(string)
	if !ok {
		return fmt.Errorf("must be text in quotes, not %s", kindOf(value))
	}
	return setText(target, s)
}

func setList(target reflect.Value, value any) error {
	list, ok := value.([]any)
	if !ok {
		return fmt.Errorf("must be a list such as [\"a\", \"b\"], not %s", kindOf(value))
	}
	out := []string{}
	for _, e := range list {
		s, ok := e.(string)
		if !ok {
			return fmt.Errorf("must hold texts in quotes, not %s", kindOf(e))
		}
		out = append(out, s)
	}
	target.Set(reflect.ValueOf(out))
	return nil
}

func setMap(target reflect.Value, value any) error {
	table, ok := value.(map[string]any)
	if !ok {
		return fmt.Errorf("must be a table such as { zone = \"a\" }, not %s", kindOf(value))
	}
	out := map[string]string{}
	for k, e := range table {
		s, ok := e.(string)
		if !ok {
			return fmt.Errorf("%s must be text in quotes, not %s", k, kindOf(e))
		}
		out[k] = s
	}
	target.Set(reflect.ValueOf(out))
	return nil
}

// kindOf names the type of a decoded TOML value for the operator.
func kindOf(value any) string {
	switch value.(type) {
	case string:
		return "text"
	case int64, float64:
		return "a number"
	case bool:
		return "true or false"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}

// format writes a default as Set reads it.
func format(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case []string:
		return strings.Join(x, ",")
	case map[string]string:
		pairs := make([]string, 0, len(x))
		for k, e := range x {
			pairs = append(pairs, k+"="+e)
		}
		return strings.Join(pairs, ",")
	default:
		return fmt.Sprint(x)
	}
}
