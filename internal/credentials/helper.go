package credentials

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	helpers "github.com/docker/docker-credential-helpers/credentials"
)

// helperTimeout bounds one call of a credential helper. Those of clouds ask a
// server; one that asks a human never ends.
const helperTimeout = 15 * time.Second

// tokenUser is the user by which a helper says that its secret is an identity
// token.
const tokenUser = "<token>"

// program runs a helper. It implements client.Program.
type program struct{ *exec.Cmd }

func (p program) Input(in io.Reader) { p.Stdin = in }

// ask gets the credential for a server, as the helper knows it, from
// docker-credential-<helper>, or ErrNone. A helper that has not answered within the
// limit is ended. What it prints is in no error: it may be a secret.
func ask(ctx context.Context, limit time.Duration, helper, server, source string) (Credential, error) {
	if helper == "" || strings.ContainsAny(helper, "/\x00") {
		return Credential{}, fmt.Errorf("%s: %q is no name of a credential helper", source, helper)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := client.Get(func(args ...string) client.Program {
		cmd := exec.CommandContext(ctx, "docker-credential-"+helper, args...)
		cmd.WaitDelay = time.Second // its children may hold its output open
		return program{cmd}
	}, server)
	switch {
	case helpers.IsErrCredentialsNotFound(err):
		return Credential{}, ErrNone
	case err != nil:
		return Credential{}, fmt.Errorf("%s: docker-credential-%s gives no credential for %s: %w; is it in the daemon's PATH, and what does it say to 'echo %s | docker-credential-%s get'?",
			source, helper, server, reason(ctx, err), server, helper)
	case c.Secret == "":
		return Credential{}, ErrNone
	case c.Username == tokenUser:
		return Credential{"", c.Secret, source}, nil
	}
	return Credential{c.Username, c.Secret, source}, nil
}

var errHelper = errors.New("it failed")

// reason is why a helper failed, without what it said.
func reason(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if strings.Contains(err.Error(), exec.ErrNotFound.Error()) {
		return exec.ErrNotFound
	}
	return errHelper
}
