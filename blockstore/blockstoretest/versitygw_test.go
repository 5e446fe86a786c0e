package blockstoretest_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestFrozenServerAnswersAfterThaw(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	s := server.Store(t, server.NewBucket(t), "p")
	if _, err := s.Put(t.Context(), "k", []byte(content), blockstore.IfAbsent); err != nil {
		t.Fatal(err)
	}
	server.Freeze(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := get(ctx, s, "k"); err == nil {
		t.Error("a frozen server answered")
	}
	server.Thaw(t)
	if got, err := get(t.Context(), s, "k"); err != nil || got != content {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestServerKeepsItsObjectsWhileStopped(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	s := server.Store(t, bucket, "p")
	if _, err := s.Put(t.Context(), "dir/k", []byte(content), blockstore.IfAbsent); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	if data, err := os.ReadFile(filepath.Join(server.Dir, bucket, "p/dir/k")); err != nil || string(data) != content {
		t.Errorf("the file holds %q, %v", data, err)
	}
	server.Start(t)
	if got, err := get(t.Context(), s, "dir/k"); err != nil || got != content {
		t.Errorf("got %q, %v", got, err)
	}
}

// putInChild is what TestMain does in a child process: it opens a store by its
// URL alone and puts an object.
func putInChild(url string) error {
	s, err := blockstore.Open(context.Background(), url)
	if err != nil {
		return err
	}
	_, err = s.Put(context.Background(), "from/child", []byte(content), blockstore.IfAbsent)
	return err
}

func TestEnvMakesTheServerAChildsAWS(t *testing.T) {
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	child := func(env []string) (string, error) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "AWS_PROFILE=absent", childURLEnv+"="+server.URL(bucket, "p"))
		cmd.Env = append(cmd.Env, env...)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := child(server.EnvFor(server.ReadOnlyUser(t, bucket))); err == nil || !strings.Contains(out, blockstore.ErrDenied.Error()) {
		t.Errorf("a reader's child was not refused: %v\n%s", err, out)
	}
	if out, err := child(server.Env()); err != nil {
		t.Fatalf("child: %v\n%s", err, out)
	}
	if got, err := get(t.Context(), server.Store(t, bucket, "p"), "from/child"); err != nil || got != content {
		t.Errorf("got %q, %v", got, err)
	}
}
