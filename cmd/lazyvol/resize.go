package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
)

func (a *app) volumeResizeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "resize VOL SIZE", Short: "Make a volume larger, also while it is in use", Args: args(cobra.ExactArgs(2)),
		Long: `Makes a volume larger; what is new reads as zeros. A volume cannot shrink. The size
that it has already is no error.

A mounted volume grows at once, and so do the loop devices on it. Filesystems and
partitions on it stay as they are, to be grown by their own tools. A virtual machine
has to be told: with qemu, by the monitor's block_resize.

Snapshots have the size that the volume had when they were made.`,
		Example: `  lazyvol volume resize vol-0123456789abcdef0 20GiB
  resize2fs /dev/loop0`,
		RunE: func(c *cobra.Command, args []string) error {
			var size byteSize
			if err := size.Set(args[1]); err != nil {
				return usageError{err}
			}
			return a.resizeVolume(c.Context(), args[0], int64(size))
		},
	}
}

func (a *app) resizeVolume(ctx context.Context, target string, size int64) error {
	_, dir, err := a.volumeFolder(target)
	if err != nil {
		return err
	}
	body, err := json.Marshal(resizeRequest{Size: size})
	if err != nil {
		return err
	}
	reply, err := dialControl(dir).call(ctx, http.MethodPost, "/resize", bytes.NewReader(body))
	if errors.Is(err, errNoDaemon) {
		return a.resizeUnmounted(ctx, target, size)
	}
	if err != nil {
		return err
	}
	if err := reply.Close(); err != nil {
		return err
	}
	return a.resizeLoops(ctx, dir, size)
}

// resizeUnmounted resizes a volume that no daemon serves. It asks the store nothing.
func (a *app) resizeUnmounted(ctx context.Context, target string, size int64) error {
	v, _, err := a.openVolume(ctx, target, &mountFlags{readDeadline: defaultReadDeadline}, a.log())
	if err != nil {
		return err
	}
	return errors.Join(v.Resize(size), v.Close())
}

// resizeLoops makes the loop devices on a volume's mount as large as the volume. A
// mount that is out of sight has none that could be found.
func (a *app) resizeLoops(ctx context.Context, dir string, size int64) error {
	s, err := askStatus(ctx, dir)
	if err != nil {
		return err
	}
	if err := inSight(s); err != nil {
		return fmt.Errorf("the volume has grown, but not the loop devices that may be on it: %w", err)
	}
	image := filepath.Join(s.Mountpoint, fs.ImageName)
	devs, err := loopdev.FindByBacking(image)
	if err != nil || len(devs) == 0 {
		return err
	}
	// Rule: the kernel learns the file's new size from this; some loop drivers look
	// at what it knows and do not ask.
	st, err := os.Stat(image)
	if err == nil && st.Size() < size {
		err = fmt.Errorf("%s has %d bytes", image, st.Size())
	}
	for _, dev := range devs {
		if err == nil {
			err = loopdev.Resize(dev)
		}
	}
	if err != nil {
		return fmt.Errorf("the volume has grown, but its loop device has not; resize it again: %w", err)
	}
	return nil
}

// resizeRequest asks a daemon to make its volume larger.
type resizeRequest struct {
	Size int64 `json:"size"` // in bytes
}

func (d *daemon) serveResize(server *fs.Server, w http.ResponseWriter, r *http.Request) {
	var req resizeRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&req); err != nil {
		writeError(w, usageError{err})
		return
	}
	if d.volume == nil {
		writeError(w, refusal{fmt.Errorf("%s is a snapshot, not a volume", d.id)})
		return
	}
	err := d.volume.Resize(req.Size)
	server.Resized() // also if only the reply of a former request got lost
	if err != nil {
		d.log.Error("could not resize the volume", "error", err)
		writeError(w, err)
	}
}
