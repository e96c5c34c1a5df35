package pattern

import (
	"strings"
	"testing"
)

const (
	digest = "sha256:4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
	// no is what the images' names end in that must not match.
	no = "!"
)

func TestImagePatterns(t *testing.T) {
	for pattern, images := range map[string][]string{
		"registry.example.com/apps/web":      {"registry.example.com/apps/web:1", "registry.example.com/apps/web:latest", "registry.example.com/apps/web@" + digest + no, "registry.example.com/apps/web2:1!", "registry-example.com/apps/web:1!"},
		"registry.example.com/apps/web:v*":   {"registry.example.com/apps/web:v1", "registry.example.com/apps/web:v", "registry.example.com/apps/web:1v!", "registry.example.com/apps/web:V1!"},
		"registry.example.com/apps/web:v1.?": {"registry.example.com/apps/web:v1.2", "registry.example.com/apps/web:v1.22!", "registry.example.com/apps/web:v1x2!"},
		"registry.example.com/*/web":         {"registry.example.com/apps/web:1", "registry.example.com/a/b/web:1!", "registry.example.com/web:1!"},
		"registry.example.com/**":            {"registry.example.com/a:1", "registry.example.com/a/b/c:1", "registry.example.com/a@" + digest + no, "registry.example.com.evil.net/a:1!", "registry.example.com:5000/a:1!"},
		"registry.example.com/**/web":        {"registry.example.com/a/web:1", "registry.example.com/a/b/web:1", "registry.example.com/web:1!"},
		"*.example.com/web":                  {"a.example.com/web:1", "a.b.example.com/web:1", "example.com/web:1!", "evil.com/x.example.com/web:1!"},
		"*/web":                              {"localhost:5000/web:1", "docker.io/library/web:1!"},
		"localhost:5000/web":                 {"localhost:5000/web:7", "localhost:5001/web:7!"},
		"localhost:5000/web:5000":            {"localhost:5000/web:5000", "localhost:5000/web:1!"},
		"localhost:*/web:*-rc*":              {"localhost:1/web:1-rc2", "localhost:1/web:1!"},
		"**":                                 {"a.example/b:1", "a.example/b/c:latest", "a.example/b@" + digest + no},
		"**:latest":                          {"a.example/b:latest", "a.example/b:1!"},
		"**@*":                               {"a.example/b@" + digest, "a.example/b:latest!"},
		"a.example/b@sha256:4f*":             {"a.example/b@" + digest, "a.example/c@" + digest + no},
		"a.example/b@sha256:5*":              {"a.example/b@" + digest + no},
		"a.example/we?":                      {"a.example/web:1", "a.example/we/:1!", "a.example/we:1!"},
		"re:a\\.example/(web|api):v\\d+":     {"a.example/web:v1", "a.example/api:v22", "a.example/web:v1x!", "b.a.example/web:v1!", "axexample/web:v1!"},
		"re:a\\.example/x|b\\.example/y:1":   {"b.example/y:1", "xb.example/y:1!", "a.example/x:1!"},
		"re:.*@sha256:.*":                    {"a.example/web@" + digest, "a.example/web:v1!"},
		"re:(?i)A\\.EXAMPLE/.*":              {"a.example/web:1"},
	} {
		p, err := NewImage(pattern)
		if re, ok := strings.CutPrefix(pattern, "re:"); ok {
			p, err = NewImageRegexp(re)
		}
		if err != nil {
			t.Errorf("%s: %v", pattern, err)
			continue
		}
		for _, image := range images {
			image, bad := strings.CutSuffix(image, no)
			name, tag, d := split(image)
			if p.Match(name, tag, d) == bad {
				t.Errorf("%s matches %s: %v, want %v", pattern, image, bad, !bad)
			}
		}
	}
}

// split takes an image's name apart.
func split(image string) (name, tag, d string) {
	if name, d, ok := strings.Cut(image, "@"); ok {
		return name, "", d
	}
	i := strings.LastIndexByte(image, ':')
	return image[:i], image[i+1:], ""
}

func TestBadPatternsAreRefusedWithTheWayOut(t *testing.T) {
	for pattern, want := range map[string]string{
		"": "use letters", "nginx": "docker.io/library/nginx", "nginx:1": "has no host", "registry.example.com:5000": "has no host",
		"*": "has no host", "a.example/Web": "small letters", "a.example/web:": "is empty", "a.example/web@": "is empty",
		"a.example/web:1@*": "at once", "a.example/{web,api}": "images_regexp", "a.example//b": "no name", "/a/b": "no name",
		"a.example/": "no name", ":1": "is empty", "a.example/b@c@d": "no name", "a.example/[ab]": "images_regexp",
		strings.Repeat("a/", 600): "longer",
		"re:(":                    "missing closing", "re:a)|(b": "unexpected )", "re:" + strings.Repeat("a", 1001): "longer", "re:(?=a)": "invalid",
	} {
		_, err := NewImage(pattern)
		if re, ok := strings.CutPrefix(pattern, "re:"); ok {
			_, err = NewImageRegexp(re)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", pattern, err, want)
		}
	}
}

func TestHosts(t *testing.T) {
	h, err := NewHosts([]string{"registry.example.com", "*.dkr.ecr.*.amazonaws.com", "localhost:*", "a-*.example"})
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]bool{
		"registry.example.com": true, "registry.example.com:443": false, "xregistry.example.com": false, "registry.example.com.evil.net": false,
		"registryxexample.com": false, "1.dkr.ecr.eu-west-1.amazonaws.com": true, "1.2.dkr.ecr.eu-west-1.amazonaws.com": false,
		".dkr.ecr.eu-west-1.amazonaws.com": false, "localhost:5000": true, "localhost": false, "a-1.example": true, "a-1.example:1": false, "": false,
	} {
		if h.Match(host) != want {
			t.Errorf("%q: %v", host, !want)
		}
	}
	for _, bad := range []string{"", "A.example", "https://a.example", "a.example/b", "a b"} {
		if _, err := NewHosts([]string{bad}); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if (Hosts{}).Match("a.example") {
		t.Error("an empty list matches")
	}
}

func TestMediaTypes(t *testing.T) {
	for pattern, want := range map[string]bool{
		"application/vnd.oci.image.index.v1+json": true, "application/vnd.oci.*": true, "application/vnd.oci": false, "*/*": true, "application/vnd-oci.*": false,
	} {
		if MediaType(pattern).MatchString("application/vnd.oci.image.index.v1+json") != want {
			t.Errorf("%s: %v", pattern, !want)
		}
	}
}

// Whatever is written: no panic, and a pattern that has no * and no ? matches
// the image of its own name and no other.
func FuzzImage(f *testing.F) {
	for _, s := range []string{"registry.example.com/apps/web:v1", "localhost:5000/**:*", "**@*", "a/b@sha256:0", "a/?:**", "(a|b)/c:1"} {
		f.Add(s, "registry.example.com/apps/web", "v1")
	}
	f.Fuzz(func(t *testing.T, s, name, tag string) {
		if p, err := NewImageRegexp(s); err == nil {
			p.Match(name, tag, digest)
			p.MatchName(name)
		}
		if h, err := NewHosts([]string{s}); err == nil && h.Match(name) && !strings.Contains(s, "*") && s != name {
			t.Errorf("host %q matches %q", s, name)
		}
		p, err := NewImage(s)
		if err != nil {
			return
		}
		p.Match(name, tag, digest)
		if strings.ContainsAny(s, "*?@") {
			return
		}
		own, ownTag := s, ""
		if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
			own, ownTag = s[:i], s[i+1:]
		}
		if ownTag == "" {
			ownTag = "any"
		}
		if !p.Match(own, ownTag, "") || p.Match(own, "", digest) {
			t.Errorf("%q does not match its own name, or matches without a tag", s)
		}
		if p.Match(name, ownTag, "") != (name == own) {
			t.Errorf("%q and %q", s, name)
		}
	})
}
