// Package credentials finds the user and secret for a registry in the files in
// which operators keep them: Docker's config.json, with credential helpers and
// credential stores, and the files of Kubernetes' pull secrets
// (.dockerconfigjson, .dockercfg). The files are read again when they change.
//
// Docker's own package reads their format, and its package for helpers speaks
// with those; what is here is what both lack: several files, entries for a part
// of a registry or for several hosts, as kubelet takes them, and a bound on how
// long a helper may take.
package credentials

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// Credential is a user and secret. It prints and logs as its source only.
type Credential struct {
	Username string // empty: Secret is an identity token
	Secret   string
	Source   string // the file and its entry, for messages
}

// String returns the source.
func (c Credential) String() string { return c.Source }

// GoString returns the source.
func (c Credential) GoString() string { return c.Source }

// LogValue returns the source.
func (c Credential) LogValue() slog.Value { return slog.StringValue(c.Source) }

// ErrNone says that no file has a credential for the host and repository.
var ErrNone = errors.New("no credential")

// Keychain finds credentials in files. Its methods may be called from any number
// of goroutines.
type Keychain struct {
	files []*file
	limit time.Duration // of one call of a helper
}

// New returns a keychain of the files, all of which may be absent for now. It
// reads nothing. What is wrong with a file is logged once for each state of it.
func New(paths []string, log *slog.Logger) *Keychain {
	k := &Keychain{limit: helperTimeout}
	for _, p := range paths {
		k.files = append(k.files, &file{path: p, log: log})
	}
	return k
}

// candidate is an entry that may be meant.
type candidate struct {
	entry
	file  *file
	order int // of the file
}

// Lookup returns the credential for a repository (such as "team/app") at a host
// (such as "registry.example.com:5000"), or ErrNone. Of several entries the one
// with the longest path counts, then one that names the host over one with a
// pattern, then the one in the first file; a credential store, which has no
// entries that could be seen, is asked when nothing else is there. The error is
// another one when a helper fails; it says which.
func (k *Keychain) Lookup(ctx context.Context, host, repository string) (Credential, error) {
	var found []candidate
	states := make([]*state, len(k.files))
	for i, f := range k.files {
		states[i] = f.load()
		for _, e := range states[i].entries {
			if e.matches(host, repository) {
				found = append(found, candidate{e, f, i})
			}
		}
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		return cmp.Or(
			cmp.Compare(len(b.path), len(a.path)),
			cmp.Compare(a.wildcards(), b.wildcards()),
			cmp.Compare(a.order, b.order),
			cmp.Compare(b.helper, a.helper), // as Docker does, a helper before what is written down
			cmp.Compare(a.key, b.key),       // so that the answer is always the same
		)
	})
	for _, c := range found {
		source := fmt.Sprintf("entry %q of %s", c.key, c.file.path)
		if c.helper == "" {
			return Credential{c.username, c.secret, source}, nil
		}
		if cred, err := ask(ctx, k.limit, c.helper, c.key, source); !errors.Is(err, ErrNone) {
			return cred, err
		}
	}
	for i, f := range k.files {
		if states[i].store == "" {
			continue
		}
		for _, name := range storeNames(host) {
			cred, err := ask(ctx, k.limit, states[i].store, name, fmt.Sprintf("credsStore of %s", f.path))
			if !errors.Is(err, ErrNone) {
				return cred, err
			}
		}
	}
	return Credential{}, ErrNone
}

// Paths returns the files' paths.
func (k *Keychain) Paths() []string {
	var out []string
	for _, f := range k.files {
		out = append(out, f.path)
	}
	return out
}
