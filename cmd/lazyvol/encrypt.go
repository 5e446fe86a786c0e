package main

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/crypt"
)

// keyEnv has the key that --key is if it is not given: encryption by default.
const keyEnv = "LAZYVOL_KEY"

// keyFlag adds --key, for what begins a lineage.
func keyFlag(flags *pflag.FlagSet, key *string) {
	flags.StringVar(key, "key", "", "encrypt it under the key that this `URI` names: file:///path ('lazyvol key generate') or awskms:///key-or-alias ("+keyEnv+"; default: not encrypted)")
}

// checkKey refuses a URI that names no key, before anything is done.
func checkKey(uri string) error {
	if uri == "" {
		return nil
	}
	if err := crypt.ValidateURI(uri); err != nil {
		return usageError{fmt.Errorf("--key: %w", err)}
	}
	return nil
}

// errKeyOfLineage: a key was given for what has one by its lineage.
var errKeyOfLineage = errors.New("it is encrypted as its lineage is, and under that key: --key is for what begins a lineage ('lazyvol snapshot copy --key' encrypts, or changes the key)")

// secretKeys are the keys of an invocation. From the first data key on, other
// processes of the user cannot look into this one, and it leaves no core.
type secretKeys struct {
	*crypt.Keys
	hide sync.Once
	err  error
}

func newSecretKeys() *secretKeys { return &secretKeys{Keys: crypt.NewKeys(crypt.Options{})} }

func (k *secretKeys) hidden() error {
	k.hide.Do(func() {
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
			k.err = fmt.Errorf("keep keys out of core dumps: %w", err)
		}
	})
	return k.err
}

// Generate implements [snapshot.Keys].
func (k *secretKeys) Generate(ctx context.Context, uri, lineage string) (plain, wrapped []byte, canonical string, err error) {
	if err := k.hidden(); err != nil {
		return nil, nil, "", err
	}
	return k.Keys.Generate(ctx, uri, lineage)
}

// Unwrap implements [snapshot.Keys].
func (k *secretKeys) Unwrap(ctx context.Context, uri string, wrapped []byte, lineage string) ([]byte, error) {
	if err := k.hidden(); err != nil {
		return nil, err
	}
	return k.Keys.Unwrap(ctx, uri, wrapped, lineage)
}
