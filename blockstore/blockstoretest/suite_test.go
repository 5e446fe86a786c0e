package blockstoretest_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemPassesTheSuite(t *testing.T) {
	blockstoretest.Run(t, func(*testing.T) blockstore.Store { return blockstore.NewMem() })
}

func TestDirPassesTheSuite(t *testing.T) {
	blockstoretest.Run(t, func(t *testing.T) blockstore.Store { return blockstore.NewDir(t.TempDir()) })
}

func TestIfMatchNeverBringsBackADeletedObject(t *testing.T) {
	t.Run("Mem", func(t *testing.T) {
		blockstoretest.RunDeleteRace(t, func(*testing.T) blockstore.Store { return blockstore.NewMem() })
	})
	t.Run("Dir", func(t *testing.T) {
		blockstoretest.RunDeleteRace(t, func(t *testing.T) blockstore.Store { return blockstore.NewDir(t.TempDir()) })
	})
}

// versitygw answers some Puts with 409 while a neighbour is deleted, and these
// stores are never used without Retry.
func retrying(s blockstore.Store) blockstore.Store {
	return blockstore.Retry(s, blockstore.RetryPolicy{Base: time.Millisecond, Max: 50 * time.Millisecond, Rate: 1000})
}

func TestS3PassesTheSuite(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	blockstoretest.Run(t, func(t *testing.T) blockstore.Store {
		return retrying(server.Store(t, server.NewBucket(t), ""))
	})
}

// All stores of this test share a bucket, where they must not see each other.
func TestS3WithAPrefixPassesTheSuite(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	var stores atomic.Int32
	blockstoretest.Run(t, func(t *testing.T) blockstore.Store {
		return retrying(server.Store(t, bucket, fmt.Sprintf("some/prefix-%d", stores.Add(1))))
	})
}
