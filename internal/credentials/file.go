package credentials

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"

	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
)

// maxFile bounds a credential file, in bytes. Kubernetes' secrets are smaller.
const maxFile = 1 << 20

// file is a credential file and what it last said.
type file struct {
	path string
	log  *slog.Logger

	mu    sync.Mutex
	info  fs.FileInfo // guarded by mu; of state; nil: of a file that could not be looked at
	state *state      // guarded by mu; nil before the first load
	why   string      // guarded by mu; why state says nothing; "": the file was understood
	again bool        // guarded by mu; the file could not be read, and may be readable as it is
}

// state is what a file says. It is not changed once made.
type state struct {
	entries []entry
	store   string // helper for every registry without an entry; "": none
}

// entry is one registry of a file, or a part of one, or a pattern of several.
type entry struct {
	pattern
	key              string // as the file has it
	helper           string // asks this helper; "": what follows
	username, secret string
}

// load returns what the file says now. A file that is absent or not understood
// says nothing. That, and the end of it, is logged when it changes.
func (f *file) load() *state {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	changed := f.state == nil || !same(info, f.info)
	if err == nil && !changed && !f.again {
		return f.state
	}
	f.info, f.state = info, &state{}
	if err == nil {
		f.state, err = read(f.path)
	}
	why := ""
	if err != nil {
		why = err.Error()
	}
	switch {
	case err != nil && (changed || why != f.why):
		f.log.Warn("credentials cannot be read: going on without this file", "path", f.path, "err", err)
	case err == nil && f.why != "":
		f.log.Info("credentials can be read again", "path", f.path)
	}
	// A mode that lets it be read, its own or that of a directory, shows in nothing that is compared here.
	var failed *fs.PathError
	f.why, f.again = why, errors.As(err, &failed)
	return f.state
}

// same tells whether a file seems not to have changed, or still cannot be looked
// at (nil).
func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

func read(path string) (*state, error) {
	r, err := os.Open(path)
	if err != nil {
		return &state{}, err
	}
	defer r.Close() //nolint:errcheck // opened for reading: nothing can be lost
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return &state{}, err
	}
	if len(data) > maxFile {
		return &state{}, fmt.Errorf("more than %d bytes: this is no credential file", maxFile)
	}
	return parse(data)
}

// parse reads a config.json or .dockerconfigjson, or a .dockercfg, which is the
// former's "auths" alone. It returns a state with every error. Errors tell
// nothing of the content.
func parse(data []byte) (*state, error) {
	s := &state{}
	data, err := config(data)
	if err != nil || data == nil {
		return s, err
	}
	c := configfile.New("")
	if err := c.LoadFromReader(bytes.NewReader(data)); err != nil {
		return s, errors.New("not of the form of Docker's config.json: an entry of \"auths\" is no base64 of user:password, or a field is of another type")
	}
	for key, helper := range c.CredentialHelpers {
		if helper == "" { // Docker asks none then: what is written down counts
			continue
		}
		s.entries = append(s.entries, entry{pattern: parsePattern(key), key: key, helper: helper})
	}
	for key, a := range c.AuthConfigs {
		e := entry{pattern: parsePattern(key), key: key}
		// What has neither is what 'docker login' writes beside a credential store.
		if e.username, e.secret = plain(a); e.secret != "" {
			s.entries = append(s.entries, e)
		}
	}
	s.store = c.CredentialsStore
	return s, nil
}

func plain(a types.AuthConfig) (username, secret string) {
	if a.IdentityToken != "" {
		return "", a.IdentityToken
	}
	return a.Username, a.Password
}

// config returns the data in the form of a config.json, or nil for nothing.
func config(data []byte) ([]byte, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, nil
	}
	var top map[string]json.RawMessage
	if err := json.Unmarshal(data, &top); err != nil {
		return nil, errors.New("not a JSON object")
	}
	for key, value := range top {
		if key == "auths" || key == "credHelpers" || !bytes.HasPrefix(bytes.TrimSpace(value), []byte("{")) {
			return data, nil
		}
	}
	return json.Marshal(map[string]any{"auths": top})
}
