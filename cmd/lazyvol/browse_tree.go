package main

import (
	"context"
	"errors"
	"log/slog"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The folders of a browse.
const (
	byID     = "by-id"
	byTime   = "by-time"
	byTag    = "by-tag"
	byVolume = "by-volume"
)

const (
	// listEvery is how old a listing must be for the next one. A store that takes
	// long to list is asked less often: listRest times as long as that took.
	listEvery = 3 * time.Second
	listRest  = 10

	// listPatience is how long folders wait for a listing, all that are looked at
	// meanwhile together, before they show the last one. One that the store did not
	// answer is not waited for at all.
	listPatience = 5 * time.Second

	// listDeadline bounds a listing with all its retries.
	listDeadline = time.Minute
)

// A browseTree is the [fs.Tree] of the snapshots in a store, as it was listed last.
// Nothing is listed while nobody looks, or asks whether it is healthy.
type browseTree struct {
	list  func(context.Context) ([]snapshot.Description, error)
	shelf *shelf
	log   *slog.Logger

	work context.Context // ends with the tree
	stop context.CancelFunc
	busy sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	root    *fs.Folder
	count   int       // of images in it
	listed  time.Time // when the listing that it is of began
	asked   time.Time // when the last one ended, whatever came of it
	cost    time.Duration
	failed  error         // why that one failed
	damaged error         // what is wrong with snapshots that are not shown
	running chan struct{} // closed when the listing under way ends; nil: none is
	began   time.Time     // when that began
}

// newBrowseTree lists the store for the first time.
func newBrowseTree(ctx context.Context, list func(context.Context) ([]snapshot.Description, error), s *shelf, log *slog.Logger) (*browseTree, error) {
	t := &browseTree{list: list, shelf: s, log: log}
	t.work, t.stop = context.WithCancel(context.WithoutCancel(ctx))
	t.refresh(ctx)
	if t.failed != nil {
		t.stop()
		return nil, t.failed
	}
	return t, nil
}

// Root implements [fs.Tree].
func (t *browseTree) Root(ctx context.Context, fresh bool) *fs.Folder {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !fresh || t.recent() {
		return t.root
	}
	running := t.begin()
	if t.failed != nil { // then the last known is what there is, until it answers
		return t.root
	}
	rest := t.rest()
	t.mu.Unlock()
	await(ctx, running, rest)
	t.mu.Lock()
	return t.root
}

// recent reports whether the last listing is too young for another one. mu is held.
func (t *browseTree) recent() bool { return time.Since(t.asked) < max(listEvery, listRest*t.cost) }

// begin begins to list the store unless that is under way, and returns what is closed
// when it has ended. mu is held.
func (t *browseTree) begin() (running <-chan struct{}) {
	if t.work.Err() != nil {
		return t.work.Done()
	}
	if t.running == nil {
		running := make(chan struct{})
		t.running, t.began = running, time.Now()
		t.busy.Go(func() {
			defer close(running)
			ctx, cancel := context.WithTimeout(t.work, listDeadline)
			defer cancel()
			t.refresh(ctx)
		})
	}
	return t.running
}

// rest is how long folders still wait for the listing that is under way: with a store
// that does not answer, all together no longer than one. mu is held.
func (t *browseTree) rest() time.Duration { return listPatience - time.Since(t.began) }

// await waits for a listing.
func await(ctx context.Context, running <-chan struct{}, rest time.Duration) {
	patience := time.NewTimer(rest)
	defer patience.Stop()
	select {
	case <-running:
	case <-patience.C:
	case <-ctx.Done():
	}
}

// ask finds out whether the store can be listed, if it could not or nobody looked for
// storeQuiet.
func (t *browseTree) ask(ctx context.Context) {
	t.mu.Lock()
	if t.recent() || t.failed == nil && time.Since(t.asked) < storeQuiet {
		t.mu.Unlock()
		return
	}
	running, rest := t.begin(), t.rest()
	t.mu.Unlock()
	await(ctx, running, rest)
}

// askAgain begins to list a store that could not be listed once each storeQuiet: if
// nobody looks, nobody else does, and metrics would tell of what is long over.
func (t *browseTree) askAgain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed != nil && time.Since(t.asked) >= storeQuiet {
		t.begin()
	}
}

// expire makes the next look at the tree list the store.
func (t *browseTree) expire() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.asked = time.Time{}
}

// refresh lists the store. A listing that fails leaves the tree as it is: what cannot be
// asked for is not gone.
func (t *browseTree) refresh(ctx context.Context) {
	begin := time.Now()
	found, err := t.list(ctx)
	var root *fs.Folder
	count := 0
	if found != nil || err == nil { // beside an error are those that are whole
		root, count = t.arrange(found)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.running, t.asked, t.cost = nil, time.Now(), time.Since(begin)
	if root == nil {
		t.cost = 0 // of asking in vain
		if t.root != nil && t.work.Err() == nil {
			t.log.Warn("the store could not be listed; the tree is as it was", "listed", t.listed, "error", err)
		}
		t.failed = err
		return
	}
	if t.failed != nil {
		t.log.Info("the store can be listed again")
	}
	if err != nil && (t.damaged == nil || t.damaged.Error() != err.Error()) {
		t.log.Error("snapshots that are damaged are not shown", "error", err)
	}
	t.root, t.count, t.listed, t.failed, t.damaged = root, count, begin, nil, err
}

// arrange makes the tree of a list.
func (t *browseTree) arrange(found []snapshot.Description) (root *fs.Folder, count int) {
	root = newFolder()
	for _, name := range []string{byID, byTime, byTag, byVolume} {
		root.Folders[name] = newFolder()
	}
	images := make([]*browsed, 0, len(found))
	for _, d := range found {
		if d.State != snapshot.Completed {
			continue
		}
		image := t.shelf.image(d)
		images = append(images, image)
		add(root, d.Start, byID).Images[imageName(d.ID)] = fs.Image{Device: image, Modified: d.Start}
		link := func(folders ...string) {
			to := path.Join(strings.Repeat("../", len(folders)), byID, imageName(d.ID))
			add(root, d.Start, folders...).Links[timeName(d.Start, d.ID)] = fs.Link{To: to, Modified: d.Start}
		}
		link(byTime)
		for key, value := range d.Tags {
			link(byTag, fileName(key), fileName(value))
		}
		if d.Volume != "" {
			link(byVolume, fileName(string(d.Volume)))
		}
	}
	t.shelf.know(images)
	return root, len(images)
}

func newFolder() *fs.Folder {
	return &fs.Folder{Folders: make(map[string]*fs.Folder), Images: make(map[string]fs.Image), Links: make(map[string]fs.Link)}
}

// add returns the folder of that path, making what is missing, for something of a time.
func add(f *fs.Folder, at time.Time, path ...string) *fs.Folder {
	touch := func(f *fs.Folder) {
		if f.Modified.Before(at) {
			f.Modified = at
		}
	}
	touch(f)
	for _, name := range path {
		below := f.Folders[name]
		if below == nil {
			below = newFolder()
			f.Folders[name] = below
		}
		f = below
		touch(f)
	}
	return f
}

// status tells what is shown, and what is wrong with it.
func (t *browseTree) status() (count int, listed time.Time, problem error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.count, t.listed, errors.Join(t.failed, t.damaged)
}

// waiting reports whether the store could not be listed.
func (t *browseTree) waiting() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed != nil
}

// close ends what is under way. Nobody looks at the tree any more.
func (t *browseTree) close() {
	t.mu.Lock()
	t.stop() // begin looks at that
	t.mu.Unlock()
	t.busy.Wait()
}
