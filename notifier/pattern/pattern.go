// Package pattern reads the patterns by which the notifier's rules name images
// and hosts. It is strict: what would match nothing, or not what was meant, is
// refused with the way to write it.
package pattern

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

const maxPattern = 1000 // bytes of one pattern

// Image is a compiled pattern of images, safe for concurrent use.
type Image struct {
	name, tag, digest *regexp.Regexp // tag, digest: nil matches any tag, and no image without one
	whole             *regexp.Regexp // of ImageRegexp; the others are nil then
}

var imageChars = regexp.MustCompile(`^[A-Za-z0-9._/:@*?-]+$`)

// NewImage compiles a pattern of images: host/repository, and then perhaps :tag
// or @digest. In the name "*" stands for any characters of one part of the path
// (the host with its port is one) and "**" for any characters; "?" stands for
// one character. In tag and digest "*" and "**" are the same.
//
// A pattern without tag matches whatever the tag, but no image that was pushed
// without one: for those it must end in @*, or in a part of the digest.
func NewImage(s string) (*Image, error) {
	if len(s) > maxPattern {
		return nil, fmt.Errorf("longer than %d bytes", maxPattern)
	}
	if !imageChars.MatchString(s) {
		return nil, errors.New("use letters, digits, '.', '_', '-', '/', ':', '@', '*' and '?'; images_regexp takes regular expressions")
	}
	name, dgst, hasDigest := strings.Cut(s, "@")
	tag, hasTag := "", false
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name, tag, hasTag = name[:i], name[i+1:], true
	}
	switch {
	case name == "" || hasTag && tag == "" || hasDigest && dgst == "":
		return nil, errors.New("a part of it is empty: write host/repository, host/repository:tag or host/repository@*")
	case !strings.Contains(name, "/") && !strings.HasPrefix(name, "**"):
		return nil, fmt.Errorf("has no host: begin it with one (Docker Hub's %s would be docker.io/library/%s), or with **", name, name)
	case strings.ToLower(name) != name:
		return nil, errors.New("hosts and repositories are written in small letters")
	case strings.HasPrefix(name, "/") || strings.HasSuffix(name, "/") || strings.Contains(name, "//") || strings.Contains(dgst, "@"):
		return nil, errors.New("is no name of an image: write host/repository, host/repository:tag or host/repository@*")
	case hasTag && hasDigest:
		return nil, errors.New("tag and digest at once: an image that was pushed with a tag is matched by its tag, one without by its digest")
	}
	p := &Image{name: glob(name, `[^/]`)}
	if hasTag {
		p.tag = glob(tag, `.`)
	}
	if hasDigest {
		p.digest = glob(dgst, `.`)
	}
	return p, nil
}

// NewImageRegexp compiles a regular expression (RE2) that must match all of
// host/repository:tag, or of host/repository@digest where there is no tag.
func NewImageRegexp(s string) (*Image, error) {
	if len(s) > maxPattern {
		return nil, fmt.Errorf("longer than %d bytes", maxPattern)
	}
	if _, err := regexp.Compile(s); err != nil { // alone, so that no parenthesis closes ours
		return nil, err
	}
	re, err := regexp.Compile(`^(?:` + s + `)$`)
	if err != nil {
		return nil, err
	}
	return &Image{whole: re}, nil
}

// Match tells whether an image matches. Its name is host/repository; without a
// tag ("") the digest counts.
func (p *Image) Match(name, tag, digest string) bool {
	if p.whole != nil {
		if tag == "" {
			return p.whole.MatchString(name + "@" + digest)
		}
		return p.whole.MatchString(name + ":" + tag)
	}
	switch {
	case !p.name.MatchString(name):
		return false
	case tag == "":
		return p.digest != nil && p.digest.MatchString(digest)
	case p.digest != nil:
		return false
	}
	return p.tag == nil || p.tag.MatchString(tag)
}

// MatchName tells whether it is about that repository, whatever the tag; a
// regular expression cannot be asked, and is not.
func (p *Image) MatchName(name string) bool { return p.name != nil && p.name.MatchString(name) }

// Hosts is a list of compiled patterns of hosts, safe for concurrent use.
type Hosts []*regexp.Regexp

var hostChars = regexp.MustCompile(`^[a-z0-9.*:-]+$`)

// NewHosts compiles patterns of hosts, each with its port if image names have
// one. "*" stands for one or more characters between two dots.
func NewHosts(patterns []string) (Hosts, error) {
	out := make(Hosts, 0, len(patterns))
	for _, s := range patterns {
		if len(s) > maxPattern || !hostChars.MatchString(s) {
			return nil, fmt.Errorf("%q: a host has small letters, digits, '.', '-' and perhaps a port; * stands for characters between two dots", s)
		}
		re, err := regexp.Compile("^" + strings.ReplaceAll(regexp.QuoteMeta(s), `\*`, `[^.:]+`) + "$")
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s, err)
		}
		out = append(out, re)
	}
	return out, nil
}

// Match tells whether a host, with its port if it has one, is on the list.
func (h Hosts) Match(host string) bool {
	for _, re := range h {
		if re.MatchString(host) {
			return true
		}
	}
	return false
}

// MediaType compiles a media type in which "*" stands for any characters.
func MediaType(s string) *regexp.Regexp { return glob(strings.ToLower(s), `.`) }

// glob compiles a pattern in which "*" stands for any number of the given
// characters, "?" for one of them, and "**" for any characters.
func glob(s, char string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString("^")
	for i := 0; i < len(s); i++ {
		switch {
		case strings.HasPrefix(s[i:], "**"):
			b.WriteString(".*")
			i++
		case s[i] == '*':
			b.WriteString(char + "*")
		case s[i] == '?':
			b.WriteString(char)
		default:
			b.WriteString(regexp.QuoteMeta(s[i : i+1]))
		}
	}
	b.WriteString("$")
	return regexp.MustCompile(b.String())
}
