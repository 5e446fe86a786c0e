package blockstoretest_test

import (
	"testing"

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

func TestS3PassesTheSuite(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	t.Run("WholeBucket", func(t *testing.T) {
		blockstoretest.Run(t, func(t *testing.T) blockstore.Store {
			return server.Store(t, server.NewBucket(t), "")
		})
	})
}

func TestS3WithAPrefixPassesTheSuite(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	t.Run("Prefix", func(t *testing.T) {
		blockstoretest.Run(t, func(t *testing.T) blockstore.Store {
			return server.Store(t, bucket, "some/prefix-"+t.Name()[len(t.Name())-8:])
		})
	})
}
