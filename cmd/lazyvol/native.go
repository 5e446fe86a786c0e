package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/volume"
)

// A loop device on a snapshot of which all is on this host is attached to the data file
// itself, or moved to it: reads then cost what those of a local file do, and need no
// daemon. The file has a second name for that, in the session's folder:
// by it the device is found, and as long as it is there nothing is evicted.

// nativeImage is that name.
func nativeImage(sessionDir string) string { return filepath.Join(sessionDir, fs.ImageName) }

// takeBack removes the file from a session's folder unless a loop device reads it,
// and reports whether one does. Only the session's process may ask, or who holds its
// lock.
func takeBack(sessionDir string) (given bool, err error) {
	image := nativeImage(sessionDir)
	if given, err = fileExists(image); !given || err != nil {
		return false, err
	}
	devs, err := loopdev.FindByBacking(image)
	if err != nil || len(devs) > 0 {
		return true, err
	}
	return false, os.Remove(image)
}

// moveLoops moves the loop devices on the mount of a snapshot that is complete, if
// nothing was read from them since it was called last: who is about to mount one must
// not find it busy. Mounted ones stay until they are not. Where it does not work they
// are only slower. Of a file that no device reads any more it takes the name back.
func (d *daemon) moveLoops(ctx context.Context) {
	if d.volume != nil || d.device.Encrypted() || os.Geteuid() != 0 {
		return
	}
	d.native.Lock()
	defer d.native.Unlock()
	err := d.moveIdle(ctx)
	if err == nil && len(d.activity) == 0 {
		_, err = takeBack(d.dir)
	}
	if err != nil && ctx.Err() == nil {
		d.log.Debug("loop devices keep reading through the mount", "error", err)
	}
}

// moveIdle is moveLoops with d.native held. It leaves those that were not moved in
// d.activity.
func (d *daemon) moveIdle(ctx context.Context) error {
	before := d.activity
	d.activity = make(map[string]string)
	loops, err := loopdev.FindByBacking(filepath.Join(d.mountpoint, fs.ImageName))
	if err != nil || len(loops) == 0 {
		return err
	}
	for _, dev := range loops {
		if d.activity[dev], err = loopdev.Activity(dev); err != nil {
			return err
		}
	}
	if err := d.giveAway(ctx); err != nil {
		return err
	}
	for _, dev := range loops {
		if d.activity[dev] != before[dev] {
			continue
		}
		switch err := loopdev.Change(dev, nativeImage(d.dir)); {
		case err == nil:
			d.log.Info("a loop device reads the local file from now on", "device", dev)
			delete(d.activity, dev)
		case !errors.Is(err, loopdev.ErrBusy):
			return err
		}
	}
	return nil
}

// A snapshot that could not be given away, because the store does not have what the
// disk has lost, or the filesystem no second names, is read as a whole again after
// so many times as long as that took, and no sooner than that.
const (
	giveRest    = 10
	giveRestMin = time.Minute
)

var errResting = errors.New("it could not be given away just now")

// giveAway makes the session's name of the data file, unless it is there. d.native
// is held.
func (d *daemon) giveAway(ctx context.Context) error {
	image := nativeImage(d.dir)
	if given, err := fileExists(image); given || err != nil {
		return err
	}
	begin := time.Now()
	if begin.Before(d.giveAgain) {
		return errResting
	}
	err := d.device.GiveAway(ctx, image)
	// What is not complete was not read, and who had no time says nothing of it.
	if err != nil && !errors.Is(err, volume.ErrIncomplete) && ctx.Err() == nil {
		d.giveAgain = time.Now().Add(max(giveRestMin, giveRest*time.Since(begin)))
	}
	return err
}

// attachPatience bounds how long an attach waits for a complete snapshot to be
// verified: some gigabytes. Larger ones are attached through the mount, and moved.
const attachPatience = 3 * time.Second

// attachAnswer is the answer to a request to attach: a loop device, "" if the
// snapshot is not complete.
type attachAnswer struct {
	Device string `json:"device,omitempty"`
}

// serveAttach attaches a loop device to the local file.
func (d *daemon) serveAttach(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), attachPatience)
	defer cancel()
	var answer attachAnswer
	var err error
	if answer.Device, err = d.attachNative(ctx); err != nil {
		d.log.Debug("a loop device is attached to the mount, not to the local file", "error", err)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the client is gone if this fails
}

func (d *daemon) attachNative(ctx context.Context) (string, error) {
	if d.volume != nil {
		return "", errors.New("it is a volume")
	}
	// Held, so that the name is not taken back before the device is there. A large
	// snapshot is verified under it.
	for !d.native.TryLock() {
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	defer d.native.Unlock()
	if err := d.giveAway(ctx); err != nil {
		return "", err
	}
	return loopdev.Attach(nativeImage(d.dir), loopOptions(true))
}

// attachNative has the daemon of a mount attach a loop device to the local file. It
// returns "" if it does not.
func (a *app) attachNative(ctx context.Context, dir string) (dev string, err error) {
	sessions, err := a.sessions()
	if err != nil {
		return "", err
	}
	for _, s := range sessions {
		if s.Mountpoint != dir {
			continue
		}
		body, err := dialControl(s.dir).call(ctx, "POST", "/attach", nil)
		if errors.Is(err, errNoDaemon) {
			continue // a dead one's
		}
		if err != nil {
			return "", err
		}
		var answer attachAnswer
		err = json.NewDecoder(io.LimitReader(body, 1<<10)).Decode(&answer)
		return answer.Device, errors.Join(err, body.Close())
	}
	return "", nil
}

// loopsOf returns the loop devices on a mountpoint, moved ones included, also those
// of a daemon that was killed.
func (a *app) loopsOf(dir string) ([]string, error) {
	devs, err := loopdev.FindByBacking(filepath.Join(dir, fs.ImageName))
	if err != nil {
		return nil, err
	}
	moved, err := a.movedFrom(func(s *session) bool { return s.Mountpoint == dir })
	return append(devs, moved...), err
}

func (a *app) movedFrom(which func(*session) bool) (devs []string, err error) {
	sessions, err := a.sessions()
	if err != nil {
		return nil, err
	}
	for _, s := range sessions {
		if !which(s) {
			continue
		}
		image := nativeImage(s.dir)
		if given, err := fileExists(image); err != nil {
			return nil, err
		} else if !given {
			continue
		}
		loops, err := loopdev.FindByBacking(image)
		if err != nil {
			return nil, err
		}
		devs = append(devs, loops...)
	}
	return devs, nil
}

// refuseAttachedMount refuses to take a mount away on which there are loop devices, or off
// which some were moved: those use it as much.
func (a *app) refuseAttachedMount(dir string, pid int) error {
	devs, err := loopdev.FindByBacking(filepath.Join(dir, fs.ImageName))
	if err != nil {
		return err
	}
	moved, err := a.movedFrom(func(s *session) bool { return s.Mountpoint == dir && s.PID == pid })
	if devs = append(devs, moved...); err == nil && len(devs) > 0 {
		err = fmt.Errorf("unmount %s: %w: %s is attached: 'lazyvol detach %s' first", dir, fs.ErrBusy, strings.Join(devs, ", "), devs[0])
	}
	return err
}

// mountOfImage returns the mountpoint of a loop device's backing file: the folder it
// is in, or that of the session to whose local file the device was moved.
func (a *app) mountOfImage(image string) (string, error) {
	dir := filepath.Dir(image)
	switch {
	case filepath.Base(image) != fs.ImageName:
		return "", iofs.ErrNotExist
	case !isSessionID(filepath.Base(dir)):
		return dir, nil
	}
	sessions, err := a.sessions()
	if err != nil {
		return "", err
	}
	for _, s := range sessions {
		if s.ID == filepath.Base(dir) {
			return s.Mountpoint, nil
		}
	}
	return "", iofs.ErrNotExist
}
