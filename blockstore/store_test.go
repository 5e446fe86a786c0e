package blockstore_test

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// TestMain also is the other process of the tests that need one.
func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDirEnv); dir != "" {
		if err := runWriter(dir, os.Getenv(writerRoleEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func TestMemKeepsThePromises(t *testing.T) {
	newStore := func(*testing.T) blockstore.Store { return blockstore.NewMem() }
	blockstoretest.Run(t, newStore)
	t.Run("DeleteRace", func(t *testing.T) { blockstoretest.RunDeleteRace(t, newStore) })
}

func TestDecoratorsKeepThePromises(t *testing.T) {
	blockstoretest.Run(t, func(*testing.T) blockstore.Store {
		return blockstore.Retry(blockstore.Limit(blockstoretest.NewFaulty(blockstore.NewMem()), 2), blockstore.RetryPolicy{})
	})
}
