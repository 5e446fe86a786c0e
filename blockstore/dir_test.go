package blockstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestDirKeepsThePromises(t *testing.T) {
	newStore := func(t *testing.T) blockstore.Store { return blockstore.NewDir(t.TempDir()) }
	blockstoretest.Run(t, newStore)
	t.Run("DeleteRace", func(t *testing.T) { blockstoretest.RunDeleteRace(t, newStore) })
}

func mustPut(t testing.TB, s blockstore.Store, key, data string) (etag string) {
	t.Helper()
	etag, err := s.Put(t.Context(), key, []byte(data), blockstore.Condition{})
	if err != nil {
		t.Fatal(err)
	}
	return etag
}

func listKeys(t testing.TB, s blockstore.Store) []string {
	t.Helper()
	var keys []string
	err := s.List(t.Context(), "", func(info blockstore.Info) error {
		keys = append(keys, info.Key)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// callAll makes every call of a Store once, on the object "k".
func callAll(ctx context.Context, s blockstore.Store) map[string]error {
	errs := make(map[string]error)
	_, _, errs["Get"] = s.Get(ctx, "k", 100)
	errs["ReadRange"] = s.ReadRange(ctx, "k", 0, make([]byte, 1))
	errs["List"] = s.List(ctx, "", func(blockstore.Info) error { return nil })
	_, errs["Put"] = s.Put(ctx, "k", []byte("data"), blockstore.Condition{})
	_, errs["Put IfAbsent"] = s.Put(ctx, "new", []byte("data"), blockstore.IfAbsent)
	errs["Delete"] = s.Delete(ctx, "k")
	return errs
}

func TestDirThatIsMissingIsErrNoStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "missing")
	for call, err := range callAll(t.Context(), blockstore.NewDir(dir)) {
		if !errors.Is(err, blockstore.ErrNoStore) || errors.Is(err, blockstore.ErrNotExist) {
			t.Errorf("%s: got error %v, want %v alone", call, err, blockstore.ErrNoStore)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the calls made the directory: %v", err)
	}
}

func TestCreateMakesADirForThisUserAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	for range 2 { // the second time it is there
		s, err := blockstore.Create(t.Context(), "file://"+dir)
		if err != nil {
			t.Fatal(err)
		}
		mustPut(t, s, "x/y", "data")
	}
	for path, want := range map[string]os.FileMode{"": 0o700, "x": 0o700, "x/y": 0o600} {
		info, err := os.Stat(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%q has permissions %v, want %v", path, got, want)
		}
	}
}

func TestCreateOfADirWhereAFileIsFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, file + "/below"} {
		if _, err := blockstore.Create(t.Context(), "file://"+path); err == nil {
			t.Errorf("Create of %s succeeded", path)
		}
	}
}

func TestDirObjectsGetThePermissionsOfTheStore(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	mustPut(t, blockstore.NewDir(dir), "x/y", "data")
	for path, want := range map[string]os.FileMode{"x": 0o750, "x/y": 0o640} {
		info, err := os.Stat(filepath.Join(dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%q has permissions %v, want %v", path, got, want)
		}
	}
}

// asNobody calls fn, on this goroutine, with the rights of an ordinary user in
// the filesystem.
func asNobody(t *testing.T, fn func()) {
	if os.Geteuid() != 0 {
		fn() // with files that this user owns, whose permissions bind it
		return
	}
	runtime.LockOSThread()
	if err := syscall.Setfsuid(65534); err != nil { // takes the thread's CAP_DAC_OVERRIDE as well
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setfsuid(0); err != nil {
			t.Fatal(err) // and the thread ends with this goroutine
		}
		runtime.UnlockOSThread()
	}()
	fn()
}

func TestReadOnlyDirCanBeReadAndRefusesWrites(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	etag := mustPut(t, s, "k", "content")
	mustPut(t, s, "dir/k", "content")
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o555, dir + "/dir": 0o555, dir + "/k": 0o444, dir + "/dir/k": 0o444, dir + "/.lock": 0o444} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	asNobody(t, func() {
		for call, err := range callAll(t.Context(), s) {
			write := strings.HasPrefix(call, "Put") || call == "Delete"
			if write && !errors.Is(err, blockstore.ErrDenied) {
				t.Errorf("%s: got error %v, want %v", call, err, blockstore.ErrDenied)
			}
			if !write && err != nil {
				t.Errorf("%s: %v", call, err)
			}
		}
		if data, got, err := s.Get(t.Context(), "k", 100); err != nil || string(data) != "content" || got != etag {
			t.Errorf("got %q with ETag %q, %v", data, got, err)
		}
	})
	if got, want := listKeys(t, s), []string{"dir/k", "k"}; !slices.Equal(got, want) {
		t.Errorf("the store has %q, want %q", got, want)
	}
}

func TestUnreadableObjectInADirIsErrDenied(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	mustPut(t, s, "k", "content")
	mustPut(t, s, "closed/k", "content")
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir + "/k": 0, dir + "/closed": 0} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.Chmod(dir+"/closed", 0o755) })
	asNobody(t, func() {
		for _, key := range []string{"k", "closed/k", "closed/absent"} {
			if _, _, err := s.Get(t.Context(), key, 100); !errors.Is(err, blockstore.ErrDenied) {
				t.Errorf("get %q: got error %v, want %v", key, err, blockstore.ErrDenied)
			}
		}
		err := s.List(t.Context(), "", func(blockstore.Info) error { return nil })
		if !errors.Is(err, blockstore.ErrDenied) {
			t.Errorf("a listing that cannot see everything: got error %v, want %v", err, blockstore.ErrDenied)
		}
	})
}

func TestDirKeysThatNestAreErrKey(t *testing.T) {
	s := blockstore.NewDir(t.TempDir())
	mustPut(t, s, "a/b", "content")
	for _, key := range []string{"a", "a/b/c", "a/b/c/d"} {
		for _, c := range []blockstore.Condition{{}, blockstore.IfAbsent} {
			if _, err := s.Put(t.Context(), key, nil, c); !errors.Is(err, blockstore.ErrKey) || errors.Is(err, blockstore.ErrExists) {
				t.Errorf("put %q with %+v: got error %v, want %v alone", key, c, err, blockstore.ErrKey)
			}
		}
		if err := s.Delete(t.Context(), key); err != nil {
			t.Errorf("delete %q: %v", key, err)
		}
	}
	if got, want := listKeys(t, s), []string{"a/b"}; !slices.Equal(got, want) {
		t.Errorf("the store has %q, want %q", got, want)
	}
}

func TestDirListsAndReadsOnlyWhatPutMade(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "secret")
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	mustPut(t, s, "d/object", "content")
	steps := []error{
		os.WriteFile(outside, []byte("secret"), 0o644),
		os.Symlink(outside, dir+"/link"),
		os.Symlink(filepath.Dir(outside), dir+"/linkdir"),
		os.Symlink("d", dir+"/inside"),
		os.Symlink("nowhere", dir+"/dangling"),
		syscall.Mkfifo(dir+"/pipe", 0o644),
		os.WriteFile(dir+"/with space", nil, 0o644),
		os.WriteFile(dir+"/.hidden", nil, 0o644),
		os.MkdirAll(dir+"/empty/.git/objects", 0o755),
	}
	if err := errors.Join(steps...); err != nil {
		t.Fatal(err)
	}
	if got, want := listKeys(t, s), []string{"d/object"}; !slices.Equal(got, want) {
		t.Errorf("the store lists %q, want %q", got, want)
	}
	for _, key := range []string{"link", "linkdir/secret", "dangling", "pipe", "d", "empty"} {
		if data, _, err := s.Get(t.Context(), key, 100); err == nil {
			t.Errorf("get %q returned %q", key, data)
		}
	}
	if _, err := s.Put(t.Context(), "linkdir/new", nil, blockstore.IfAbsent); err == nil {
		t.Error("a put went through a symbolic link out of the store")
	}
}

func TestDirETagNeverRepeatsWhenTheClockStands(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	etag := mustPut(t, s, "k", "0")
	future := time.Now().Add(time.Hour).Truncate(100 * time.Nanosecond)
	if err := os.Chtimes(dir+"/k", future, future); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{etag: true}
	for i := range 5 { // all in the same tick, as it were: the object's time is ahead of the clock
		etag := mustPut(t, s, "k", fmt.Sprint(i))
		if seen[etag] {
			t.Fatalf("put %d repeats the ETag %q", i, etag)
		}
		seen[etag] = true
	}
}

func TestDirSweepsUpWhatCrashesLeft(t *testing.T) {
	dir := t.TempDir()
	mustPut(t, blockstore.NewDir(dir), "k", "content")
	old := time.Now().Add(-25 * time.Hour)
	for _, name := range []string{"old", "new"} {
		if err := os.WriteFile(filepath.Join(dir, ".tmp", name), []byte("half an obj"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(filepath.Join(dir, ".tmp", "old"), old, old); err != nil {
		t.Fatal(err)
	}
	s := blockstore.NewDir(dir)
	if got, want := listKeys(t, s), []string{"k"}; !slices.Equal(got, want) {
		t.Errorf("the store lists %q, want %q", got, want)
	}
	mustPut(t, s, "k", "content")
	if diff := cmp.Diff([]string{"new"}, fileNames(t, filepath.Join(dir, ".tmp"))); diff != "" {
		t.Errorf("temporary files (-want +got):\n%s", diff)
	}
}

func TestDirKeepsNoFileOfWhatWasDeletedOrFailed(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	mustPut(t, s, "a/b/c/d", "content")
	mustPut(t, s, "a/kept", "content")
	if _, err := s.Put(t.Context(), "a/kept", nil, blockstore.IfAbsent); !errors.Is(err, blockstore.ErrExists) {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "a/kept", nil, blockstore.IfMatch("other")); !errors.Is(err, blockstore.ErrChanged) {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), "a/b/c/d"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"kept"}, fileNames(t, filepath.Join(dir, "a"))); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if got := fileNames(t, filepath.Join(dir, ".tmp")); len(got) != 0 {
		t.Errorf("temporary files remain: %q", got)
	}
}

func TestDirPutWaitsForTheLockUntilItsContextIsDone(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	mustPut(t, s, "k", "before")
	lock, err := os.Open(filepath.Join(dir, ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Put(ctx, "k", []byte("after"), blockstore.Condition{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got error %v, want %v", err, context.DeadlineExceeded)
	}
	if data, _, err := s.Get(t.Context(), "k", 100); err != nil || string(data) != "before" {
		t.Errorf("got %q, %v; reading needs no lock", data, err)
	}
}

func fileNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// The roles of another process, which TestMain gives to runWriter.
const (
	writerDirEnv  = "LAZYVOL_TEST_WRITER_DIR"
	writerRoleEnv = "LAZYVOL_TEST_WRITER_ROLE"

	roleCount = "count" // creates keys and counts in an object
	roleFill  = "fill"  // writes without end, to be killed

	writerRounds = 20
)

func runWriter(dir, role string) error {
	ctx, s := context.Background(), blockstore.NewDir(dir)
	if role == roleFill {
		for n := 0; ; n++ {
			data := bytes.Repeat([]byte{byte(n)}, 1<<20)
			if _, err := s.Put(ctx, fmt.Sprintf("fill/%d/created", n), data, blockstore.IfAbsent); err != nil && !errors.Is(err, blockstore.ErrExists) {
				return err
			}
			if _, err := s.Put(ctx, "fill/replaced", data, blockstore.Condition{}); err != nil {
				return err
			}
		}
	}
	for n := range writerRounds {
		_, err := s.Put(ctx, fmt.Sprintf("won/%d", n), fmt.Append(nil, os.Getpid()), blockstore.IfAbsent)
		if err == nil {
			err = increment(ctx, s)
		}
		if err != nil && !errors.Is(err, blockstore.ErrExists) {
			return err
		}
	}
	return nil
}

func increment(ctx context.Context, s blockstore.Store) error {
	for {
		data, etag, err := s.Get(ctx, "counter", 100)
		if err != nil {
			return err
		}
		var n int
		if _, err := fmt.Sscanf(string(data), "%d", &n); err != nil {
			return err
		}
		_, err = s.Put(ctx, "counter", fmt.Appendf(nil, "%03d", n+1), blockstore.IfMatch(etag))
		if !errors.Is(err, blockstore.ErrChanged) {
			return err
		}
	}
}

func writer(t *testing.T, dir, role string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerDirEnv+"="+dir, writerRoleEnv+"="+role)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestDirConditionsAreExactBetweenProcesses(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	mustPut(t, s, "counter", "000")
	var processes []*exec.Cmd
	for range 4 {
		processes = append(processes, writer(t, dir, roleCount))
	}
	for _, p := range processes {
		if err := p.Wait(); err != nil {
			t.Errorf("writer: %v", err)
		}
	}
	// Each key was created by one process, which then counted one.
	data, _, err := s.Get(t.Context(), "counter", 100)
	if want := fmt.Sprintf("%03d", writerRounds); err != nil || string(data) != want {
		t.Errorf("%s creations succeeded, want %s of as many keys (%v)", data, want, err)
	}
}

func TestDirObjectsAreWholeAfterAKill(t *testing.T) {
	dir := t.TempDir()
	s := blockstore.NewDir(dir)
	for range 5 {
		p := writer(t, dir, roleFill)
		time.Sleep(time.Duration(50+rand.IntN(100)) * time.Millisecond)
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.Wait() // says that it was killed
		for _, key := range listKeys(t, s) {
			data, _, err := s.Get(t.Context(), key, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) != 1<<20 || !bytes.Equal(data, bytes.Repeat(data[:1], 1<<20)) {
				t.Errorf("%q is torn", key)
			}
		}
	}
	if len(listKeys(t, s)) == 0 {
		t.Error("no writer lived long enough to write anything")
	}
	mustPut(t, s, "fill/replaced", "a killed writer's lock is free")
}
