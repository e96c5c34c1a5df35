package registry

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"
)

// explainedError is an error with what an operator can do about it before it.
type explainedError struct {
	what string
	err  error
}

func (e *explainedError) Error() string { return e.what + ": " + e.err.Error() }
func (e *explainedError) Unwrap() error { return e.err }

// explain names the setting that helps, where one may.
func explain(host string, err error) error {
	var done *explainedError
	var unknown x509.UnknownAuthorityError
	var answer *errcode.ErrorResponse
	what := ""
	switch {
	case errors.As(err, &done):
		return err
	case errors.Is(err, http.ErrSchemeMismatch):
		what = "speaks plain HTTP: if that is right, add it to registry.plain_http"
	case errors.As(err, &unknown):
		what = "has a certificate of an authority that is not known: add the authority's to registry.ca_file"
	case errors.Is(err, auth.ErrBasicCredentialNotFound):
		what = "wants credentials: a file of registry.credential_files must have some for it"
	case errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden):
		what = "does not let the notifier in: a file of registry.credential_files must have credentials for it that may pull the image"
	default:
		return err
	}
	return &explainedError{fmt.Sprintf("registry %s %s", host, what), err}
}
