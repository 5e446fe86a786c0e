package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A listedFake is a store that lists what it is told, in its time.
type listedFake struct {
	mu    sync.Mutex // guards what follows, once the tree is there
	found []snapshot.Description
	err   error
	takes time.Duration
	asked int
}

func (l *listedFake) list(ctx context.Context) ([]snapshot.Description, error) {
	l.mu.Lock()
	l.asked++
	found, err, takes := l.found, l.err, l.takes
	l.mu.Unlock()
	select {
	case <-time.After(takes):
		return found, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// answers makes the store answer otherwise.
func (l *listedFake) answers(takes time.Duration, err error, found ...snapshot.Description) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.takes, l.err, l.found = takes, err, found
}

// times returns how often the store was listed.
func (l *listedFake) times() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.asked
}

// inTree calls test with the tree of a store, in a world where time passes when all wait.
func inTree(t *testing.T, l *listedFake, test func(t *testing.T, tree *browseTree, log *bytes.Buffer)) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newShelf(t.Context())
		defer s.closeAll()
		tree, err := newBrowseTree(t.Context(), l.list, s, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		defer tree.close()
		test(t, tree, &log)
	})
}

func listing(n uint64, d snapshot.Description) snapshot.Description {
	d.ID = manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: n}
	d.Start = time.Date(2026, 11, 22, 10, 30, int(n), 0, time.UTC)
	d.Geometry = manifest.Geometry{Size: 1 << 30, BlockSize: 1 << 19}
	if d.State == "" {
		d.State = snapshot.Completed
	}
	return d
}

// paths lists a folder, with what links point to, cleaned.
func paths(f *fs.Folder, at string, into map[string]string) map[string]string {
	for name, below := range f.Folders {
		into[path.Join(at, name)] = "folder"
		paths(below, path.Join(at, name), into)
	}
	for name := range f.Images {
		into[path.Join(at, name)] = "image"
	}
	for name, link := range f.Links {
		into[path.Join(at, name)] = path.Join(at, link.To)
	}
	return into
}

func TestTreeHasEachCompletedSnapshotUnderAllItsNames(t *testing.T) {
	const a, b = "snap-1a2b3c4d000000001.img", "snap-1a2b3c4d000000002.img"
	const aTime, bTime = "2026-11-22T10-30-01.000Z_" + a, "2026-11-22T10-30-02.000Z_" + b
	l := &listedFake{found: []snapshot.Description{
		listing(1, snapshot.Description{Tags: map[string]string{"env": "prod", "a/b": ""}}),
		listing(2, snapshot.Description{Volume: "vol-0123456789abcdef0", Tags: map[string]string{"env": "prod"}}),
		listing(3, snapshot.Description{State: snapshot.Pending}),
		listing(4, snapshot.Description{State: snapshot.Aborted}),
	}}
	inTree(t, l, func(t *testing.T, tree *browseTree, _ *bytes.Buffer) {
		want := map[string]string{
			"by-id": "folder", "by-id/" + a: "image", "by-id/" + b: "image",
			"by-time": "folder", "by-time/" + aTime: "by-id/" + a, "by-time/" + bTime: "by-id/" + b,
			"by-tag": "folder", "by-tag/env": "folder", "by-tag/env/prod": "folder",
			"by-tag/env/prod/" + aTime: "by-id/" + a, "by-tag/env/prod/" + bTime: "by-id/" + b,
			"by-tag/a%2Fb": "folder", "by-tag/a%2Fb/%empty": "folder", "by-tag/a%2Fb/%empty/" + aTime: "by-id/" + a,
			"by-volume": "folder", "by-volume/vol-0123456789abcdef0": "folder", "by-volume/vol-0123456789abcdef0/" + bTime: "by-id/" + b,
		}
		if diff := cmp.Diff(want, paths(tree.Root(t.Context(), false), "", make(map[string]string))); diff != "" {
			t.Error(diff)
		}
		image := tree.Root(t.Context(), false).Folders[byID].Images[a]
		if image.Size() != 1<<30 || !image.Modified.Equal(l.found[0].Start) {
			t.Errorf("%s has %d bytes, of %s", a, image.Size(), image.Modified)
		}
	})
}

func names(tree *browseTree, ctx context.Context, fresh bool) []string {
	return slices.Sorted(maps.Keys(tree.Root(ctx, fresh).Folders[byID].Images))
}

func TestTreeListsTheStoreOnlyWhenSomebodyLooksAndNotTooOften(t *testing.T) {
	l := &listedFake{found: []snapshot.Description{listing(1, snapshot.Description{})}}
	inTree(t, l, func(t *testing.T, tree *browseTree, _ *bytes.Buffer) {
		time.Sleep(time.Hour)
		tree.Root(t.Context(), false)
		if n := l.times(); n != 1 {
			t.Errorf("the store was listed %d times though nobody looked", n)
		}
		first, second := l.found[0], listing(2, snapshot.Description{})
		l.answers(0, nil, first, second)
		for range 100 {
			if n := len(names(tree, t.Context(), true)); n != 2 {
				t.Errorf("%d images", n)
			}
		}
		if n := l.times(); n != 2 {
			t.Errorf("the store was listed %d times in a row", n)
		}
		l.answers(0, nil, second)
		time.Sleep(listEvery)
		if got := names(tree, t.Context(), true); len(got) != 1 || !strings.HasSuffix(got[0], "2.img") {
			t.Errorf("after a delete there is %q", got)
		}
		// A store that takes its time is asked less often.
		const slow = 2 * time.Second
		l.answers(slow, nil, second)
		time.Sleep(listEvery)
		names(tree, t.Context(), true)
		asked := l.times()
		time.Sleep(listRest*slow - time.Second)
		names(tree, t.Context(), true)
		if l.times() != asked {
			t.Error("a slow store was listed again at once")
		}
		tree.expire()
		names(tree, t.Context(), true)
		if l.times() != asked+1 {
			t.Error("an expired listing was not renewed")
		}
	})
}

func TestStoreThatIsDownLeavesTheTreeAsItWas(t *testing.T) {
	l := &listedFake{found: []snapshot.Description{listing(1, snapshot.Description{})}}
	inTree(t, l, func(t *testing.T, tree *browseTree, log *bytes.Buffer) {
		l.answers(time.Hour, errors.New("the store is down"))
		time.Sleep(listEvery)
		begin := time.Now()
		for range 100 { // as ls -lR
			if got := names(tree, t.Context(), true); len(got) != 1 {
				t.Errorf("while it is not known there are %q", got)
			}
		}
		if waited := time.Since(begin); waited > listPatience {
			t.Errorf("the folders waited %s", waited)
		}
		time.Sleep(listDeadline)
		synctest.Wait()
		if !tree.waiting() || !strings.Contains(log.String(), "could not be listed") {
			t.Errorf("nobody is told: %s", log)
		}
		begin = time.Now()
		for range 10 {
			time.Sleep(listEvery)
			if got := names(tree, t.Context(), true); len(got) != 1 {
				t.Errorf("while it is down there are %q", got)
			}
		}
		if waited := time.Since(begin) - 10*listEvery; waited > time.Second {
			t.Errorf("folders waited %s for a store that is known to be down", waited)
		}
		l.answers(0, nil) // and there are none any more
		time.Sleep(listDeadline)
		synctest.Wait()
		tree.expire()
		names(tree, t.Context(), true)
		synctest.Wait()
		if got := names(tree, t.Context(), true); len(got) != 0 || tree.waiting() {
			t.Errorf("when it is back there are %q, waiting %t", got, tree.waiting())
		}
	})
}

// Whether a browse is healthy is not what somebody saw who looked long ago.
func TestAStoreIsListedForItsHealth(t *testing.T) {
	l := &listedFake{}
	inTree(t, l, func(t *testing.T, tree *browseTree, _ *bytes.Buffer) {
		tree.ask(t.Context())
		if l.times() != 1 {
			t.Error("it is listed again at once")
		}
		time.Sleep(storeQuiet)
		l.answers(0, errors.New("the store is down"))
		tree.ask(t.Context())
		if !tree.waiting() {
			t.Error("a store that is down is not noticed")
		}
		tree.askAgain()
		synctest.Wait()
		if l.times() != 2 {
			t.Error("metrics ask a store that has failed just now")
		}
		l.answers(0, nil)
		time.Sleep(listEvery)
		if tree.ask(t.Context()); tree.waiting() {
			t.Error("a store that is back is not noticed")
		}
		time.Sleep(storeQuiet)
		l.answers(0, errors.New("the store is down"))
		tree.ask(t.Context())
		l.answers(0, nil)
		time.Sleep(storeQuiet)
		tree.askAgain()
		synctest.Wait()
		if tree.waiting() {
			t.Error("metrics tell for ever of a store that was down")
		}
		l.answers(time.Hour, nil)
		time.Sleep(storeQuiet)
		begin := time.Now()
		if tree.ask(t.Context()); time.Since(begin) > listPatience {
			t.Errorf("health waited %s", time.Since(begin))
		}
	})
}

func TestDamagedSnapshotsAreNamedAndTheOthersShown(t *testing.T) {
	l := &listedFake{found: []snapshot.Description{listing(1, snapshot.Description{})}, err: errors.New("list snap-2: it is damaged")}
	inTree(t, l, func(t *testing.T, tree *browseTree, log *bytes.Buffer) {
		for range 3 {
			if got := names(tree, t.Context(), true); len(got) != 1 {
				t.Errorf("there are %q", got)
			}
			time.Sleep(listEvery)
		}
		if n := strings.Count(log.String(), "it is damaged"); n != 1 {
			t.Errorf("it was told %d times:\n%s", n, log)
		}
		if _, _, problem := tree.status(); problem == nil || tree.waiting() {
			t.Errorf("the status says %v, waiting %t", problem, tree.waiting())
		}
	})
}

func TestTreeOfAStoreThatIsDownIsNotShown(t *testing.T) {
	down := errors.New("the store is down")
	s := newShelf(t.Context())
	defer s.closeAll()
	if _, err := newBrowseTree(t.Context(), (&listedFake{err: down}).list, s, slog.New(slog.DiscardHandler)); !errors.Is(err, down) {
		t.Errorf("the error is %v", err)
	}
}
