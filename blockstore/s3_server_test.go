package blockstore_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// quickRetry hides what versitygw 1.8.0 does to a Put while a neighbour in the
// same directory is deleted (409, or 500), as it would be hidden in use.
func quickRetry(s blockstore.Store) blockstore.Store {
	return blockstore.Retry(s, blockstore.RetryPolicy{Base: time.Millisecond, Max: 50 * time.Millisecond, Rate: 1000})
}

// All stores of this test share a bucket, where they must not see each other.
func TestS3KeepsThePromises(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	var stores atomic.Int32
	blockstoretest.Run(t, func(t *testing.T) blockstore.Store {
		return quickRetry(server.Store(t, bucket, fmt.Sprintf("some/prefix-%d", stores.Add(1))))
	})
}

func TestS3StoreMayBeAWholeBucket(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	s := server.Store(t, bucket, "")
	mustPut(t, s, "p/k", "content")
	if got, want := listKeys(t, s), []string{"p/k"}; !slices.Equal(got, want) {
		t.Errorf("the bucket lists %q, want %q", got, want)
	}
	if got, want := listKeys(t, server.Store(t, bucket, "p")), []string{"k"}; !slices.Equal(got, want) {
		t.Errorf("under the prefix there is %q, want %q", got, want)
	}
}

func TestS3ServerRefusesWhoMayNotAndWhatIsNotThere(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	root := server.Store(t, bucket, "p")
	mustPut(t, root, "k", "content")

	key, secret := server.ReadOnlyUser(t, bucket)
	reader := server.StoreFor(t, bucket, "p", key, secret)
	for call, err := range callAll(t.Context(), reader) {
		write := strings.HasPrefix(call, "Put") || call == "Delete"
		if write && !errors.Is(err, blockstore.ErrDenied) {
			t.Errorf("%s by a reader: got error %v, want %v", call, err, blockstore.ErrDenied)
		}
		if !write && err != nil {
			t.Errorf("%s by a reader: %v", call, err)
		}
	}
	if got, want := listKeys(t, reader), []string{"k"}; !slices.Equal(got, want) {
		t.Errorf("the reader lists %q, want %q", got, want)
	}
	for call, err := range callAll(t.Context(), server.StoreFor(t, bucket, "p", server.AccessKey, "wrong secret")) {
		if !errors.Is(err, blockstore.ErrDenied) {
			t.Errorf("%s with a wrong secret: got error %v, want %v", call, err, blockstore.ErrDenied)
		}
	}
	for call, err := range callAll(t.Context(), server.Store(t, "no-such-bucket", "p")) {
		if !errors.Is(err, blockstore.ErrNoStore) || errors.Is(err, blockstore.ErrNotExist) {
			t.Errorf("%s in a bucket that is not there: got error %v, want %v", call, err, blockstore.ErrNoStore)
		}
	}
}

func TestS3OutageEndsWithoutAnyoneNoticing(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	single := server.Store(t, server.NewBucket(t), "p")
	mustPut(t, single, "k", "content")
	server.Stop()
	for call, err := range callAll(t.Context(), single) {
		if !errors.Is(err, blockstore.ErrUnavailable) {
			t.Errorf("%s while the server is down: got error %v, want %v", call, err, blockstore.ErrUnavailable)
		}
	}
	retried := make(chan error)
	go func() {
		_, _, err := blockstore.Retry(single, blockstore.RetryPolicy{}).Get(t.Context(), "k", 100)
		retried <- err
	}()
	server.Start(t)
	if err := <-retried; err != nil {
		t.Errorf("a call begun in the outage: %v", err)
	}
}
