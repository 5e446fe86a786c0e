package blockstoretest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/lazyvol/lazyvol/blockstore"
)

const (
	suiteWriters = 16              // that race for one key
	suiteMany    = 1010            // objects: more than a page of a listing, or a batch of a Delete, holds
	suitePrompt  = 5 * time.Second // is "promptly" for a cancelled call, on a busy machine
)

// Run checks that a store keeps the promises of blockstore.Store. The function
// returns a new, empty one for each of its tests.
func Run(t *testing.T, newStore func(t *testing.T) blockstore.Store) {
	tests := []struct {
		name string
		test func(*suite)
	}{
		{"GetReturnsWhatWasPut", (*suite).getReturnsWhatWasPut},
		{"PutReplacesWhole", (*suite).putReplacesWhole},
		{"PutKeepsNoReferenceToItsData", (*suite).putKeepsNoReference},
		{"AbsentObjectIsErrNotExist", (*suite).absentObject},
		{"LargerThanTheLimitIsErrTooLarge", (*suite).limit},
		{"ReadRangeAtEveryEdge", (*suite).ranges},
		{"EveryCharacterOfAKeyWorks", (*suite).keyCharacters},
		{"BadKeysAreErrKey", (*suite).badKeys},
		{"IfAbsentCreatesOnce", (*suite).createOnce},
		{"IfAbsentRaceHasOneWinner", (*suite).createRace},
		{"IfMatchReplacesOnlyWhatItNames", (*suite).compareAndSwap},
		{"IfMatchRaceLosesNoUpdate", (*suite).swapRace},
		{"DeleteOfAbsentObjectsIsFine", (*suite).deleteAbsent},
		{"DeleteDoesNotDisturbItsNeighbours", (*suite).deleteAgainstPut},
		{"ListIsOrderedAndWhole", (*suite).listOrder},
		{"ListHonoursThePrefix", (*suite).listPrefix},
		{"ListShowsWhatGetReturns", (*suite).listInfo},
		{"ListAndDeleteGoOnPastAPage", (*suite).pages},
		{"ListStopsWithItsFunction", (*suite).listStops},
		{"ListFunctionMayCallTheStore", (*suite).listReentrant},
		{"CancelledCallsEndPromptly", (*suite).cancelled},
		{"ConcurrentUse", (*suite).concurrent},
		{"ProbePasses", (*suite).probe},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.test(&suite{t, newStore(t)})
		})
	}
}

// RunDeleteRace checks one promise more: that a Put with IfMatch never brings
// back an object that is deleted at the same time. It is apart from Run because
// versitygw 1.8.0 breaks it, whose DELETE does not take the lock under which its
// PUT compares and replaces; S3 answers 409 or 404 there.
func RunDeleteRace(t *testing.T, newStore func(t *testing.T) blockstore.Store) {
	(&suite{t, newStore(t)}).swapAgainstDelete()
}

type suite struct {
	*testing.T
	store blockstore.Store
}

func (s *suite) put(key, data string, c blockstore.Condition) string {
	s.Helper()
	etag, err := s.store.Put(s.Context(), key, []byte(data), c)
	if err != nil {
		s.Fatalf("put: %v", err)
	}
	if etag == "" {
		s.Fatalf("put %q returned no ETag", key)
	}
	return etag
}

func (s *suite) get(key string) (data, etag string) {
	s.Helper()
	b, etag, err := s.store.Get(s.Context(), key, 1<<20)
	if err != nil {
		s.Fatalf("get: %v", err)
	}
	return string(b), etag
}

func (s *suite) list(prefix string) []string {
	s.Helper()
	var keys []string
	err := s.store.List(s.Context(), prefix, func(info blockstore.Info) error {
		keys = append(keys, info.Key)
		return nil
	})
	if err != nil {
		s.Fatalf("list: %v", err)
	}
	return keys
}

func (s *suite) wantErr(what string, err, want error) {
	s.Helper()
	if !errors.Is(err, want) {
		s.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

// putMany puts objects with the keys, a few at a time.
func (s *suite) putMany(keys []string) {
	s.Helper()
	queue := make(chan string, len(keys))
	for _, key := range keys {
		queue <- key
	}
	close(queue)
	s.inParallel(suiteWriters, func(int) error {
		for key := range queue {
			if _, err := s.store.Put(s.Context(), key, []byte(key), blockstore.IfAbsent); err != nil {
				return err
			}
		}
		return nil
	})
}

// inParallel calls fn(0) to fn(n-1) at once and waits for them.
func (s *suite) inParallel(n int, fn func(i int) error) {
	s.Helper()
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		s.Fatal(err)
	}
}

func (s *suite) getReturnsWhatWasPut() {
	large := strings.Repeat("0123456789abcdef", 3<<20/16) // more than any buffer on the way
	for i, want := range []string{"", "x", large} {
		key := fmt.Sprintf("dir/sub/object-%d", i)
		put := s.put(key, want, blockstore.Condition{})
		data, etag, err := s.store.Get(s.Context(), key, int64(len(want)))
		if err != nil {
			s.Fatal(err)
		}
		if string(data) != want {
			s.Errorf("got %d bytes that are not the %d bytes put", len(data), len(want))
		}
		if etag != put {
			s.Errorf("get returned ETag %q, put %q", etag, put)
		}
	}
}

func (s *suite) putReplacesWhole() {
	first := s.put("k", "a long first content", blockstore.Condition{})
	second := s.put("k", "short", blockstore.Condition{})
	if first == second {
		s.Errorf("two contents have the ETag %q", first)
	}
	if data, etag := s.get("k"); data != "short" || etag != second {
		s.Errorf("got %q with ETag %q, want %q with %q", data, etag, "short", second)
	}
}

func (s *suite) putKeepsNoReference() {
	data := []byte("before")
	if _, err := s.store.Put(s.Context(), "k", data, blockstore.Condition{}); err != nil {
		s.Fatal(err)
	}
	copy(data, "after!")
	if got, _ := s.get("k"); got != "before" {
		s.Errorf("got %q after the caller reused its buffer", got)
	}
}

func (s *suite) absentObject() {
	s.put("dir/other", "x", blockstore.Condition{})
	for _, key := range []string{"absent", "dir/absent", "absent/absent", "dir/other/absent"} {
		_, _, err := s.store.Get(s.Context(), key, 100)
		s.wantErr("get "+key, err, blockstore.ErrNotExist)
		err = s.store.ReadRange(s.Context(), key, 0, make([]byte, 1))
		s.wantErr("read "+key, err, blockstore.ErrNotExist)
	}
}

func (s *suite) limit() {
	s.put("k", "0123456789", blockstore.Condition{})
	_, _, err := s.store.Get(s.Context(), "k", 9)
	s.wantErr("get of 10 bytes with limit 9", err, blockstore.ErrTooLarge)
	for _, limit := range []int64{10, math.MaxInt64} {
		if data, _, err := s.store.Get(s.Context(), "k", limit); err != nil || string(data) != "0123456789" {
			s.Errorf("get with limit %d: %q, %v", limit, data, err)
		}
	}
}

func (s *suite) ranges() {
	const content = "012345"
	s.put("k", content, blockstore.Condition{})
	s.put("empty", "", blockstore.Condition{})
	for off := range int64(len(content) + 3) {
		for n := range int64(len(content) + 3) {
			p := bytes.Repeat([]byte{'#'}, int(n))
			err := s.store.ReadRange(s.Context(), "k", off, p)
			switch {
			case n == 0 || off+n <= int64(len(content)):
				if err != nil {
					s.Fatalf("read %d bytes at %d: %v", n, off, err)
				}
				if n > 0 && string(p) != content[off:off+n] {
					s.Errorf("read %q, want %q", p, content[off:off+n])
				}
			case !errors.Is(err, blockstore.ErrShort):
				s.Errorf("read %d bytes at %d of %d: got error %v, want %v", n, off, len(content), err, blockstore.ErrShort)
			}
		}
	}
	for _, off := range []int64{-1, math.MinInt64, math.MaxInt64} {
		s.wantErr(fmt.Sprintf("read at %d", off), s.store.ReadRange(s.Context(), "k", off, make([]byte, 1)), blockstore.ErrShort)
	}
	s.wantErr("read of an empty object", s.store.ReadRange(s.Context(), "empty", 0, make([]byte, 1)), blockstore.ErrShort)
}

func (s *suite) keyCharacters() {
	keys := []string{
		"store.json",
		"outcomes/snap-1a2b3c4d00000000f",
		"pins/snap-1a2b3c4d00000000f/vol-0123456789abcdef0",
		"data/snap-1a2b3c4d00000000f/packs/00000001",
		"events/2026-11-22T13:36:00.123456789Z-a_b",
		"chars/abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789.=+@,:",
		"equals=plus+at@/comma,colon:",
		"deep/" + strings.Repeat("d/", 50) + "leaf",
		"long/" + strings.Repeat("n", 255),
	}
	for _, key := range keys {
		s.put(key, "content of "+key, blockstore.IfAbsent)
	}
	for _, key := range keys {
		if data, _ := s.get(key); data != "content of "+key {
			s.Errorf("got %q under %q", data, key)
		}
		if got := s.list(key); !slices.Equal(got, []string{key}) {
			s.Errorf("listing %q gave %q", key, got)
		}
	}
	if err := s.store.Delete(s.Context(), keys...); err != nil {
		s.Fatal(err)
	}
	if got := s.list(""); len(got) != 0 {
		s.Errorf("after deleting everything %q remain", got)
	}
}

func (s *suite) badKeys() {
	s.put("taken", "x", blockstore.Condition{})
	keys := []string{"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/..", ".hidden", "a/.b", "a b", "a\\b", "a\x00", "ä", "a\n",
		strings.Repeat("n", 256), strings.Repeat("n/", 512) + "n"}
	for _, key := range keys {
		_, _, err := s.store.Get(s.Context(), key, 1)
		s.wantErr("get", err, blockstore.ErrKey)
		s.wantErr("read", s.store.ReadRange(s.Context(), key, 0, make([]byte, 1)), blockstore.ErrKey)
		_, err = s.store.Put(s.Context(), key, nil, blockstore.IfAbsent)
		s.wantErr("put", err, blockstore.ErrKey)
		s.wantErr("delete", s.store.Delete(s.Context(), "taken", key), blockstore.ErrKey)
		if key != "" && key != "a/" {
			err = s.store.List(s.Context(), key, func(blockstore.Info) error { return nil })
			s.wantErr(fmt.Sprintf("list %q", key), err, blockstore.ErrKey)
		}
	}
	if got := s.list(""); !slices.Equal(got, []string{"taken"}) {
		s.Errorf("refused calls left %q, want what was there before", got)
	}
	_, err := s.store.Put(s.Context(), "large", make([]byte, blockstore.MaxObjectSize+1), blockstore.Condition{})
	s.wantErr("put of too much", err, blockstore.ErrTooLarge)
}

func (s *suite) createOnce() {
	etag := s.put("k", "first", blockstore.IfAbsent)
	_, err := s.store.Put(s.Context(), "k", []byte("second"), blockstore.IfAbsent)
	s.wantErr("second create", err, blockstore.ErrExists)
	if data, got := s.get("k"); data != "first" || got != etag {
		s.Errorf("got %q with ETag %q, want %q with %q", data, got, "first", etag)
	}
	if err := s.store.Delete(s.Context(), "k"); err != nil {
		s.Fatal(err)
	}
	s.put("k", "third", blockstore.IfAbsent)
}

func (s *suite) createRace() {
	for round := range 5 {
		key := fmt.Sprintf("race/%d/k", round)
		var won [suiteWriters]bool
		s.inParallel(suiteWriters, func(i int) error {
			_, err := s.store.Put(s.Context(), key, fmt.Appendf(nil, "writer %d", i), blockstore.IfAbsent)
			won[i] = err == nil
			if errors.Is(err, blockstore.ErrExists) {
				return nil
			}
			return err
		})
		data, _ := s.get(key)
		for i := range won {
			if holds := data == fmt.Sprintf("writer %d", i); won[i] != holds {
				s.Errorf("the object holds %q, and writer %d was told that it won: %v", data, i, won[i])
			}
		}
	}
}

func (s *suite) compareAndSwap() {
	_, err := s.store.Put(s.Context(), "k", []byte("x"), blockstore.IfMatch("0123456789abcdef"))
	s.wantErr("replace an object that never was", err, blockstore.ErrChanged)
	_, err = s.store.Put(s.Context(), "dir/k", []byte("x"), blockstore.IfMatch(""))
	s.wantErr("replace an object that never was, with an empty ETag", err, blockstore.ErrChanged)

	first := s.put("k", "first", blockstore.Condition{})
	second := s.put("k", "second", blockstore.IfMatch(first))
	_, err = s.store.Put(s.Context(), "k", []byte("third"), blockstore.IfMatch(first))
	s.wantErr("replace a changed object", err, blockstore.ErrChanged)
	if data, etag := s.get("k"); data != "second" || etag != second {
		s.Errorf("got %q with ETag %q, want %q with %q", data, etag, "second", second)
	}
	if err := s.store.Delete(s.Context(), "k"); err != nil {
		s.Fatal(err)
	}
	_, err = s.store.Put(s.Context(), "k", []byte("fourth"), blockstore.IfMatch(second))
	s.wantErr("replace a deleted object", err, blockstore.ErrChanged)
	if got := s.list(""); len(got) != 0 {
		s.Errorf("a replace that failed left %q", got)
	}
}

// swapRace counts in an object, from several writers. All contents have one
// length and are written as fast as can be, so that an ETag that is made of size
// and time must not repeat.
func (s *suite) swapRace() {
	const writers, increments = 4, 5
	s.put("counter", "0000", blockstore.IfAbsent)
	s.inParallel(writers, func(int) error {
		for done := 0; done < increments; {
			data, etag, err := s.store.Get(s.Context(), "counter", 100)
			if err != nil {
				return err
			}
			var n int
			if _, err := fmt.Sscanf(string(data), "%d", &n); err != nil {
				return err
			}
			_, err = s.store.Put(s.Context(), "counter", fmt.Appendf(nil, "%04d", n+1), blockstore.IfMatch(etag))
			switch {
			case err == nil:
				done++
			case !errors.Is(err, blockstore.ErrChanged):
				return err
			}
		}
		return nil
	})
	if data, _ := s.get("counter"); data != fmt.Sprintf("%04d", writers*increments) {
		s.Errorf("counted to %s, want %04d", data, writers*increments)
	}
}

func (s *suite) swapAgainstDelete() {
	for round := range 50 {
		key := fmt.Sprintf("swap/%d", round)
		etag := s.put(key, "first", blockstore.Condition{})
		s.inParallel(2, func(i int) error {
			if i == 0 {
				return s.store.Delete(s.Context(), key)
			}
			_, err := s.store.Put(s.Context(), key, []byte("second"), blockstore.IfMatch(etag))
			if errors.Is(err, blockstore.ErrChanged) {
				return nil
			}
			return err
		})
		if got := s.list(key); len(got) != 0 {
			s.Errorf("round %d: the object is there after a Delete that raced with a replace", round)
		}
	}
}

func (s *suite) deleteAbsent() {
	for _, key := range []string{"kept", "dir/kept", "gone", "dir/gone", "gonedir/gone"} {
		s.put(key, "", blockstore.Condition{})
	}
	gone := []string{"gone", "dir/gone", "gonedir/gone", "absent", "dir/absent", "kept/absent", "absent/absent"}
	for range 2 { // the second time all are absent
		if err := s.store.Delete(s.Context(), gone...); err != nil {
			s.Fatal(err)
		}
		if diff := cmp.Diff([]string{"dir/kept", "kept"}, s.list("")); diff != "" {
			s.Errorf("objects left (-want +got):\n%s", diff)
		}
	}
	if err := s.store.Delete(s.Context()); err != nil {
		s.Errorf("delete of nothing: %v", err)
	}
}

func (s *suite) deleteAgainstPut() {
	s.inParallel(8, func(i int) error {
		for round := range 10 {
			key := fmt.Sprintf("same/dir/%d-%d", i, round)
			if _, err := s.store.Put(s.Context(), key, []byte(key), blockstore.IfAbsent); err != nil {
				return err
			}
			data, _, err := s.store.Get(s.Context(), key, 100)
			if err != nil {
				return err
			}
			if string(data) != key {
				return fmt.Errorf("got %q under %q", data, key)
			}
			if err := s.store.Delete(s.Context(), key); err != nil {
				return err
			}
		}
		return nil
	})
	if got := s.list(""); len(got) != 0 {
		s.Errorf("%q remain", got)
	}
}

func (s *suite) listOrder() {
	keys := []string{"b", "a-b", "a/b", "a.b", "ab", "a0/c", "A", "a=", "z/a/a", "z/a-a", "z/a.a/x", "z/aa", "0", "a/a/a"}
	for _, key := range keys {
		s.put(key, key, blockstore.Condition{})
	}
	slices.Sort(keys)
	if diff := cmp.Diff(keys, s.list("")); diff != "" {
		s.Errorf("listing of everything (-want +got):\n%s", diff)
	}
}

func (s *suite) listPrefix() {
	for _, key := range []string{"k/snap-1/a", "k/snap-1/b", "k/snap-11", "k/snap-2", "k/snap-3/a/b", "kk", "j/k"} {
		s.put(key, "", blockstore.Condition{})
	}
	for prefix, want := range map[string][]string{
		"k/":           {"k/snap-1/a", "k/snap-1/b", "k/snap-11", "k/snap-2", "k/snap-3/a/b"},
		"k":            {"k/snap-1/a", "k/snap-1/b", "k/snap-11", "k/snap-2", "k/snap-3/a/b", "kk"},
		"k/snap-1":     {"k/snap-1/a", "k/snap-1/b", "k/snap-11"},
		"k/snap-1/":    {"k/snap-1/a", "k/snap-1/b"},
		"k/snap-1/a":   {"k/snap-1/a"},
		"k/snap-1/a/":  nil,
		"k/snap-3/":    {"k/snap-3/a/b"},
		"k/snap-3/a/b": {"k/snap-3/a/b"},
		"kk":           {"kk"},
		"kk/":          nil,
		"l":            nil,
		"l/m/n":        nil,
	} {
		if diff := cmp.Diff(want, s.list(prefix), cmpopts.EquateEmpty()); diff != "" {
			s.Errorf("listing of %q (-want +got):\n%s", prefix, diff)
		}
	}
}

func (s *suite) listInfo() {
	want := map[string]blockstore.Info{}
	for _, data := range []string{"", "one", "another"} {
		key := "info/" + data + "x"
		want[key] = blockstore.Info{Key: key, Size: int64(len(data)), ETag: s.put(key, data, blockstore.Condition{})}
	}
	key := "info/x" // replaced: by the same size, within the same tick, perhaps
	want[key] = blockstore.Info{Key: key, ETag: s.put(key, "", blockstore.Condition{})}
	got := map[string]blockstore.Info{}
	err := s.store.List(s.Context(), "info/", func(info blockstore.Info) error {
		if info.Age < 0 || info.Age > time.Minute {
			s.Errorf("%q is listed with age %v, just after it was put", info.Key, info.Age)
		}
		if ahead := time.Until(info.Listed); ahead.Abs() > time.Minute { // the store is on this machine
			s.Errorf("%q is listed %v from now", info.Key, ahead)
		}
		info.Age, info.Listed = 0, time.Time{}
		got[info.Key] = info
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		s.Errorf("listing (-want +got):\n%s", diff)
	}
}

func (s *suite) pages() {
	var keys []string
	for i := range suiteMany {
		keys = append(keys, fmt.Sprintf("page/%04d", i))
	}
	s.putMany(keys)
	s.put("page.after", "", blockstore.Condition{})
	if diff := cmp.Diff(keys, s.list("page/")); diff != "" {
		s.Errorf("listing (-want +got):\n%s", diff)
	}
	if err := s.store.Delete(s.Context(), keys...); err != nil {
		s.Fatal(err)
	}
	if got := s.list(""); !slices.Equal(got, []string{"page.after"}) {
		s.Errorf("after the Delete %d objects remain", len(got))
	}
}

func (s *suite) listStops() {
	for i := range 10 {
		s.put(fmt.Sprintf("stop/%d", i), "", blockstore.Condition{})
	}
	stop, calls := errors.New("stop"), 0
	err := s.store.List(s.Context(), "stop/", func(blockstore.Info) error {
		calls++
		if calls == 3 {
			return stop
		}
		return nil
	})
	if err != stop || calls != 3 {
		s.Errorf("List ended after %d calls with %v, want 3 and the error of its function, as it is", calls, err)
	}
}

func (s *suite) listReentrant() {
	for i := range 5 {
		s.put(fmt.Sprintf("re/%d", i), "", blockstore.Condition{})
	}
	err := s.store.List(s.Context(), "re/", func(info blockstore.Info) error {
		if _, _, err := s.store.Get(s.Context(), info.Key, 1); err != nil {
			return err
		}
		return s.store.Delete(s.Context(), info.Key)
	})
	if err != nil {
		s.Fatal(err)
	}
	if got := s.list("re/"); len(got) != 0 {
		s.Errorf("%q remain", got)
	}
}

func (s *suite) cancelled() {
	s.put("k", "0123456789", blockstore.Condition{})
	cause := errors.New("the cause")
	ctx, cancel := context.WithCancelCause(s.Context())
	cancel(cause)
	begin := time.Now()
	_, _, err := s.store.Get(ctx, "k", 100)
	s.wantErr("get", err, cause)
	s.wantErr("read", s.store.ReadRange(ctx, "k", 0, make([]byte, 5)), cause)
	_, err = s.store.Put(ctx, "new", []byte("x"), blockstore.IfAbsent)
	s.wantErr("put", err, cause)
	s.wantErr("delete", s.store.Delete(ctx, "k"), cause)
	s.wantErr("list", s.store.List(ctx, "", func(blockstore.Info) error { return nil }), cause)
	if took := time.Since(begin); took > suitePrompt {
		s.Errorf("cancelled calls took %v", took)
	}
	if got := s.list(""); !slices.Equal(got, []string{"k"}) {
		s.Errorf("calls cancelled before they began left %q", got)
	}
}

// concurrent has several writers of several objects, with readers that must see
// each whole and never go back to an older one.
func (s *suite) concurrent() {
	const objects, versions, size = 4, 8, 64 << 10
	content := func(version int) []byte { return bytes.Repeat([]byte{byte(version)}, size) }
	for i := range objects {
		s.put(fmt.Sprintf("con/%d", i), string(content(0)), blockstore.Condition{})
	}
	s.inParallel(3*objects, func(i int) error {
		key := fmt.Sprintf("con/%d", i%objects)
		last := byte(0)
		for version := range versions {
			switch i / objects {
			case 0: // the object's only writer
				if _, err := s.store.Put(s.Context(), key, content(version), blockstore.Condition{}); err != nil {
					return err
				}
				continue
			case 1:
				data, _, err := s.store.Get(s.Context(), key, size)
				if err != nil {
					return err
				}
				if !bytes.Equal(data, content(int(data[0]))) || data[0] < last {
					return fmt.Errorf("get of %q mixes versions or went back behind version %d", key, last)
				}
				last = data[0]
			case 2:
				p := make([]byte, size/2)
				if err := s.store.ReadRange(s.Context(), key, size/4, p); err != nil {
					return err
				}
				if !bytes.Equal(p, content(int(p[0]))[:len(p)]) || p[0] < last {
					return fmt.Errorf("read of %q mixes versions or went back behind version %d", key, last)
				}
				last = p[0]
			}
		}
		return nil
	})
}

func (s *suite) probe() {
	if err := blockstore.Probe(s.Context(), s.store); err != nil {
		s.Fatal(err)
	}
	if got := s.list(""); len(got) != 0 {
		s.Errorf("the probe left %q", got)
	}
}
