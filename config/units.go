package config

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
)

// Duration is a length of time as Go writes it: "300ms", "2s", "1m30s". It is
// never negative.
type Duration time.Duration

// Duration returns d as the standard library's type.
func (d Duration) Duration() time.Duration { return time.Duration(d) }

// String returns the form that UnmarshalText reads, without the zero units that
// time.Duration prints ("1m", not "1m0s").
func (d Duration) String() string {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// MarshalText writes the form that UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a duration; a number needs its unit, so that nobody has to
// guess which one is meant.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is no duration: write a number with its unit, such as \"300ms\", \"2s\" or \"1m30s\"", text)
	}
	*d = Duration(v)
	return nil
}

// Size is a number of bytes, never negative. It reads "20GiB" (powers of 1024),
// "20GB" (powers of 1000), "512 MiB" and plain numbers of bytes.
type Size int64

// Bytes returns s as a number of bytes.
func (s Size) Bytes() int64 { return int64(s) }

// String returns the shortest exact form that UnmarshalText reads.
func (s Size) String() string {
	const kib = 1024
	v, unit := int64(s), ""
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if v == 0 || v%kib != 0 || s > maxInUnits {
			break
		}
		v, unit = v/kib, next
	}
	return strconv.FormatInt(v, 10) + unit
}

// MarshalText writes the form that UnmarshalText reads.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(text []byte) error {
	v, err := parseBytes(string(text))
	if err != nil {
		return fmt.Errorf("%q is no size: write bytes with a unit, such as \"20GiB\" or \"500MB\", or 0", text)
	}
	*s = Size(v)
	return nil
}

// Rate is a number of bytes per second, never negative; 0 is no limit. It reads
// what Size reads, with or without "/s" at the end.
type Rate int64

// Bytes returns r as bytes per second.
func (r Rate) Bytes() int64 { return int64(r) }

// String returns the shortest exact form that UnmarshalText reads.
func (r Rate) String() string {
	if r == 0 {
		return "0"
	}
	s := Size(r).String()
	if !strings.HasSuffix(s, "B") {
		s += "B"
	}
	return s + "/s"
}

// MarshalText writes the form that UnmarshalText reads.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads a rate.
func (r *Rate) UnmarshalText(text []byte) error {
	v, err := parseBytes(strings.TrimSuffix(string(text), "/s"))
	if err != nil {
		return fmt.Errorf("%q is no rate: write bytes per second with a unit, such as \"100MiB/s\", or 0 for no limit", text)
	}
	*r = Rate(v)
	return nil
}

// maxInUnits is the most that is read, and so written, with a unit. Beyond the range of
// int64 the conversion saturates or wraps, depending on the processor; no disk and no
// link is anywhere near half of it.
const maxInUnits = math.MaxInt64 / 2

var errBytes = errors.New("no number of bytes")

// parseBytes reads whole numbers of bytes exactly and leaves other units to go-units,
// which counts in floating point: hence the guard at the end.
func parseBytes(s string) (int64, error) {
	s = strings.TrimSpace(s)
	if v, err := strconv.ParseInt(strings.TrimSuffix(s, "B"), 10, 64); err == nil && v >= 0 {
		return v, nil
	}
	parse := units.FromHumanSize
	if strings.Contains(s, "i") {
		parse = units.RAMInBytes
	}
	v, err := parse(s)
	if err != nil {
		return 0, errors.Join(errBytes, err)
	}
	if v < 0 || v > maxInUnits {
		return 0, errBytes
	}
	return v, nil
}
