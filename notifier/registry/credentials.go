package registry

import (
	"context"
	"errors"

	"oras.land/oras-go/v2/registry/remote/auth"

	"github.com/imagewolf/imagewolf/internal/credentials"
)

// credentialsOf returns what the files say about a host. What they say about a part of
// it does not count, for what a login brings is kept by host.
func credentialsOf(keys *credentials.Keychain) auth.CredentialFunc {
	return func(ctx context.Context, hostport string) (auth.Credential, error) {
		c, err := keys.Lookup(ctx, hostport, "")
		switch {
		case errors.Is(err, credentials.ErrNone):
			return auth.EmptyCredential, nil
		case err != nil:
			return auth.EmptyCredential, err
		case c.Username == "":
			return auth.Credential{RefreshToken: c.Secret}, nil
		}
		return auth.Credential{Username: c.Username, Password: c.Secret}, nil
	}
}
