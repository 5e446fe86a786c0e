package crypt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/kms"
)

// What can be wrong with a key. Errors never hold a byte of one.
var (
	ErrKeyURI         = errors.New("not a usable key URI")
	ErrKeyNotFound    = errors.New("no such key")
	ErrKeyDisabled    = errors.New("the key is disabled")
	ErrKeyDenied      = errors.New("access to the key is denied")
	ErrWrongKey       = errors.New("the wrong key")
	ErrKeyUnavailable = errors.New("the key service does not answer") // after trying again for a while

	// ErrKeyFormat is a key file or a wrapped key that cannot be read: it is
	// damaged, none at all, or of a version that this build is too old for.
	ErrKeyFormat = errors.New("malformed key")
)

const (
	defaultTimeout = 10 * time.Second // AWS KMS's own p99.9 is below 1 s
	defaultTotal   = 30 * time.Second // as long as any other command tries to reach its store
)

// Options are the limits of Keys; zero fields mean the default given.
type Options struct {
	// Timeout bounds one request to a key service, its connection and the
	// credentials for it included; 10 s.
	Timeout time.Duration

	// Total bounds a call with all its requests: those that are throttled or get
	// no answer are tried again; 30 s.
	Total time.Duration
}

// Keys draws, wraps and unwraps data keys. It is safe for concurrent use. It
// reads the AWS configuration when a URI first needs it, once for each region,
// endpoint and profile, and keeps no data key.
type Keys struct {
	timeout, total time.Duration

	mu      sync.Mutex                // guards clients
	clients map[kmsServer]*kms.Client // only of configurations that loaded
}

// NewKeys returns Keys that have asked nobody anything yet.
func NewKeys(o Options) *Keys {
	return &Keys{
		timeout: cmp.Or(o.Timeout, defaultTimeout),
		total:   cmp.Or(o.Total, defaultTotal),
		clients: make(map[kmsServer]*kms.Client),
	}
}

// Generate draws a data key for a lineage and wraps it with the key that uri
// names. canonical is the URI to record beside the wrapped key: it goes on naming
// the same key when an alias is pointed at another one. Nothing is stored
// anywhere: wrapped and canonical are all there is to get at the key again. The
// caller clears plain.
func (k *Keys) Generate(ctx context.Context, uri, lineage string) (plain, wrapped []byte, canonical string, err error) {
	u, err := parseURI(uri)
	if err != nil {
		return nil, nil, "", err
	}
	if u.path != "" {
		plain, wrapped, err = generateByFile(u.path, lineage)
		canonical = u.String()
	} else {
		plain, wrapped, canonical, err = k.generateByKMS(ctx, u, lineage)
	}
	if err != nil {
		return nil, nil, "", fmt.Errorf("draw a data key for lineage %s under %s: %w", lineage, u, err)
	}
	return plain, wrapped, canonical, nil
}

// Unwrap returns the data key of a lineage that Generate wrapped. The caller
// clears it.
func (k *Keys) Unwrap(ctx context.Context, uri string, wrapped []byte, lineage string) ([]byte, error) {
	u, err := parseURI(uri)
	if err != nil {
		return nil, err
	}
	var plain []byte
	if u.path != "" {
		plain, err = unwrapByFile(u.path, wrapped, lineage)
	} else {
		plain, err = k.unwrapByKMS(ctx, u, wrapped, lineage)
	}
	if err != nil {
		return nil, fmt.Errorf("unwrap the data key of lineage %s with %s: %w", lineage, u, err)
	}
	return plain, nil
}
