package integration

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// use does one thing with a volume.
func (a *actor) use(w *twin) {
	n := a.r.IntN(100)
	if w.mount == nil {
		switch {
		case n < 15:
			a.snapshotVolume(w)
		case n < 25:
			a.deleteVolume(w)
		case n < 35:
			a.killMount(w)
		default:
			a.did("mount %s", w.vol)
			w.attach()
		}
		return
	}
	switch {
	case n < 40:
		a.work(w)
	case n < 52:
		a.snapshotVolume(w)
	case n < 62:
		a.snapshotUnderWrites(w)
	case n < 66:
		a.did("check all of %s", w.vol)
		w.checkAll()
	case n < 70:
		a.did("hydrate %s", w.vol)
		a.h.ok("hydrate", "--wait", w.vol)
	case n < 76:
		a.did("kill the daemon of %s", w.vol)
		a.kills++
		w.kill()
		w.checkAll()
	case n < 82:
		a.did("kill the daemon of %s under writes", w.vol)
		a.kills++
		w.killWhileWriting()
	case n < 88:
		a.killDaemonAtSnapshot(w)
	default:
		a.did("unmount %s", w.vol)
		w.detach()
	}
}

func (a *actor) createVolume() {
	snap, content, ok := a.g.pick(a.r)
	if !ok || len(a.twins) >= mostTwins {
		return
	}
	defer a.g.use(snap)()
	args := []string{"volume", "create", "--snapshot", snap}
	content = bytes.Clone(content)
	if a.chance(10) {
		snap, content = "", make([]byte, 3*mib+512)
		args = []string{"volume", "create", "--size", strconv.Itoa(len(content))}
	} else if a.chance(5) {
		content = append(content, make([]byte, 5*512)...)
		args = append(args, "--size", strconv.Itoa(len(content)))
	}
	r := a.run(args...)
	if r.code == killed {
		a.removeStrangers()
		return
	}
	if a.must(r, snap) {
		a.twins = append(a.twins, &twin{t: a.t, h: a.h, r: a.r, vol: strings.TrimSpace(r.stdout), bytes: content})
	}
}

// removeStrangers deletes the volumes that a killed command has made, in
// whatever state they are.
func (a *actor) removeStrangers() {
	for _, v := range parse[struct{ Volumes []volumeInfo }](a.t, a.h.ok("volume", "list", "--json")).Volumes {
		if !slices.ContainsFunc(a.twins, func(w *twin) bool { return w.vol == v.VolumeId }) {
			a.did("delete %s, whose maker was killed", v.VolumeId)
			a.h.ok("volume", "delete", v.VolumeId)
		}
	}
}

func (a *actor) deleteVolume(w *twin) {
	r := a.run("volume", "delete", w.vol)
	if r.code == killed {
		r = a.h.run("volume", "delete", w.vol)
		if r.code == 3 { // all of it is gone
			r.code = 0
		}
	}
	if r.code != 0 {
		a.t.Fatal(r)
	}
	a.twins = slices.DeleteFunc(a.twins, func(other *twin) bool { return other == w })
}

// work writes, discards and reads.
func (a *actor) work(w *twin) {
	a.did("work on %s", w.vol)
	for range 1 + a.r.IntN(30) {
		w.steps++
		switch n := a.r.IntN(10); {
		case n < 5:
			w.read()
		case n < 8:
			w.write()
		case n < 9:
			w.zero()
		default:
			if err := w.buffered.Sync(); err != nil {
				a.t.Fatal(err)
			}
		}
	}
}

// snapshotVolume makes a snapshot of a volume that nobody writes to.
func (a *actor) snapshotVolume(w *twin) {
	description := a.describe()
	r := a.run("snapshot", "create", description, w.vol)
	if a.must(r) {
		a.g.publish(strings.TrimSpace(r.stdout), bytes.Clone(w.bytes))
	}
	if r.code == killed {
		a.settle(w, description)
	}
}

// settle waits until it is decided what became of a snapshot of a volume whose
// maker was killed.
func (a *actor) settle(w *twin, description string) {
	if w.mount != nil {
		w.detach() // which waits for a snapshot that its daemon may still be giving up
	}
	w.attach()
	waitFor(a.t, w.vol+" has settled its snapshot", time.Minute, func() bool {
		return a.h.showVolume(w.vol).PendingSnapshot == ""
	})
	found, ok := a.find(description)
	a.did("the snapshot %s is %+v", description, found)
	switch {
	case ok && found.State == "completed":
		a.g.publish(found.SnapshotId, bytes.Clone(w.bytes))
	case ok && found.State == "pending":
		a.t.Fatalf("%s is pending, and its volume knows nothing of it", found.SnapshotId)
	}
}

// killDaemonAtSnapshot kills the daemon at some moment of a snapshot, which is
// then whole or not there.
func (a *actor) killDaemonAtSnapshot(w *twin) {
	description := a.describe()
	create := a.h.begin("snapshot", "create", description, w.vol)
	time.Sleep(time.Duration(a.r.IntN(150)) * time.Millisecond)
	a.kills++
	w.kill()
	r := create.wait()
	a.did("kill the daemon of %s in a snapshot: %d %q %q", w.vol, r.code, r.stdout, r.stderr)
	w.checkAll()
	a.settle(w, description)
	w.checkAll()
}

// snapshotUnderWrites makes a snapshot while somebody writes: it must be one
// moment of what was written.
func (a *actor) snapshotUnderWrites(w *twin) {
	type write struct {
		off int
		p   []byte
	}
	var writes []write
	before := bytes.Clone(w.bytes)
	var stop atomic.Bool
	var writer sync.WaitGroup
	r := newRand(a.r.Uint64())
	writer.Go(func() {
		for !stop.Load() {
			// Within one block: a write is in the snapshot or not block by block.
			off := r.IntN(len(before)/blockSize)*blockSize + r.IntN(blockSize/pageSize)*pageSize
			p := aligned(min(pageSize<<r.IntN(6), blockSize-off%blockSize))
			fill(r, p)
			if _, err := w.direct.WriteAt(p, int64(off)); err != nil {
				a.t.Errorf("write to %s: %v", w.vol, err)
				return
			}
			writes = append(writes, write{off, p})
			time.Sleep(time.Millisecond)
		}
	})
	res := a.h.run("snapshot", "create", a.describe(), w.vol)
	stop.Store(true)
	writer.Wait()
	a.did("snapshot of %s under %d writes: %d %q %q", w.vol, len(writes), res.code, res.stdout, res.stderr)
	for _, wr := range writes {
		copy(w.bytes[wr.off:], wr.p)
	}
	if !a.must(res) {
		return
	}
	snap := strings.TrimSpace(res.stdout)
	got, ok := a.exported(snap)
	if !ok {
		return
	}
	for _, wr := range writes {
		if bytes.Equal(got, before) {
			break
		}
		copy(before[wr.off:], wr.p)
	}
	if !bytes.Equal(got, before) {
		sameBytes(a.t, "what came nearest to being a moment of "+snap, got, before)
	}
	a.g.publish(snap, got)
}

// killMount kills the command that mounts a volume at some moment. Its daemon
// may just have made it.
func (a *actor) killMount(w *twin) {
	dir, err := os.MkdirTemp(a.h.dir, "mnt-")
	if err != nil {
		a.t.Fatal(err)
	}
	args := []string{"mount", w.vol, dir}
	if a.chance(2) {
		args = []string{"mount", "--foreground", w.vol, dir}
	}
	c := a.h.begin(args...)
	time.Sleep(time.Duration(a.r.IntN(150)) * time.Millisecond)
	c.signal(syscall.SIGKILL)
	r := c.wait()
	a.kills++
	a.did("%s, killed: %d %q", strings.Join(args, " "), r.code, r.stderr)
	w.mount = a.h.mountAfterKill(w.vol, dir)
	w.open()
	w.checkAll()
}
