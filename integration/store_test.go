package integration

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// A store is where hosts keep their snapshots. When its test ends, everything in
// it must verify, unless the test damages it.
type store struct {
	url   string
	env   []string // credentials
	files string   // the folder in which its objects are files

	server   *blockstoretest.S3Server // nil for a folder
	bucket   string
	endpoint string // under which hosts reach it

	unsound bool // by damaged
}

// damaged tells that the test damages the store, which then need not verify
// when the test ends.
func (s *store) damaged() { s.unsound = true }

// newDirStore makes a store in a folder.
func newDirStore(t testing.TB) *store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	return initStore(t, &store{url: "file://" + dir, files: dir})
}

// newS3Store makes a store in a bucket of a server of its own.
func newS3Store(t testing.TB) *store {
	t.Helper()
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	return initStore(t, &store{
		url: server.URL(bucket, "some/prefix"), env: server.Env(), files: filepath.Join(server.Dir, bucket, "some/prefix"),
		server: server, bucket: bucket, endpoint: server.Endpoint,
	})
}

func initStore(t testing.TB, s *store) *store {
	t.Helper()
	newHost(t, s).ok("init")
	t.Cleanup(func() {
		if !t.Failed() && !s.unsound {
			newHost(t, s).ok("snapshot", "verify", "--all")
		}
	})
	return s
}

// objects returns the sizes of the store's objects below a folder of it.
func (s *store) objects(t testing.TB, folder string) map[string]int64 {
	t.Helper()
	found := make(map[string]int64)
	root := filepath.Join(s.files, folder)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // nothing was put there, or it was removed meanwhile
		}
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		key, err := filepath.Rel(s.files, path)
		found[key] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// dataBytes returns the size of all that snapshots stored.
func (s *store) dataBytes(t testing.TB) int64 {
	t.Helper()
	total := int64(0)
	for _, size := range s.objects(t, "data") {
		total += size
	}
	return total
}

// edit changes a record of a store in a folder.
func (s *store) edit(t testing.TB, key string, change func(record map[string]any)) {
	t.Helper()
	path := filepath.Join(s.files, key)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err := json.Unmarshal(data, &record); err != nil {
		t.Fatal(err)
	}
	change(record)
	if data, err = json.Marshal(record); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
