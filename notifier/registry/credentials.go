package registry

import (
	"context"
	"fmt"
	"os"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/credentials"
)

// credentialsOf returns what docker config files say about a host: the first
// that has something counts. The files are read for every login, so that a
// secret that is exchanged is known, and logins are few, for tokens are kept.
func credentialsOf(files []string) auth.CredentialFunc {
	return func(ctx context.Context, hostport string) (auth.Credential, error) {
		for _, file := range files {
			if _, err := os.Stat(file); err != nil { // the library takes an absent file for an empty one
				return auth.EmptyCredential, fmt.Errorf("credentials: %w", err)
			}
			store, err := credentials.NewStore(file, credentials.StoreOptions{})
			if err != nil {
				return auth.EmptyCredential, fmt.Errorf("credentials in %s: %w", file, err)
			}
			c, err := credentials.Credential(store)(ctx, hostport)
			if err != nil {
				return auth.EmptyCredential, fmt.Errorf("credentials for %s in %s: %w", hostport, file, err)
			}
			if c != auth.EmptyCredential {
				return c, nil
			}
		}
		return auth.EmptyCredential, nil
	}
}
