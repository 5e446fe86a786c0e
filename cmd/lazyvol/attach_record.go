package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/volume"
)

// An attachment is the record of the filesystems that attach mounted on the devices
// of one snapshot or volume: detach unmounts those, and no others. It is made before
// they are mounted, so that none is forgotten, and may name some that are not.
type attachment struct {
	Boot   string          `json:"boot"` // of an earlier one nothing is left
	Mounts []attachedMount `json:"mounts"`
}

// An attachedMount is one filesystem that attach mounts.
type attachedMount struct {
	Dir       string `json:"dir"`    // absolute, and free of symbolic links
	Device    string `json:"device"` // the loop device, or its partition
	Partition int    `json:"partition"`
	Type      string `json:"type"`
	Options   string `json:"options"` // all that mount(8) was given

	// Lost: its daemon was killed, and it was taken down; attach mounts it again.
	Lost bool `json:"lost,omitempty"`
}

// recordSuffix is what the record's name has after the id of what is attached.
const recordSuffix = ".json"

func (a *app) attachmentFile(target string) string { return a.attachDir(target) + recordSuffix }

// attachment reads the record of a snapshot or volume; without one, and with one of
// another boot, there are no mounts.
func (a *app) attachment(target string) (r attachment, err error) {
	boot, err := volume.BootID()
	if err != nil {
		return r, err
	}
	data, err := vfs.ReadFile(vfs.OS(), a.attachmentFile(target), 1<<20)
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil && !errors.Is(err, iofs.ErrNotExist) {
		return r, fmt.Errorf("read what is attached in %s: %w", a.attachmentFile(target), err)
	}
	if r.Boot != boot {
		r = attachment{Boot: boot}
	}
	return r, nil
}

// changeAttachment changes a record; one without mounts is removed.
func (a *app) changeAttachment(target string, change func([]attachedMount) []attachedMount) (err error) {
	folder, err := os.Open(a.attachDir(""))
	if err != nil {
		return fmt.Errorf("record what is attached: %w", err)
	}
	defer folder.Close() // and with it the lock
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("record what is attached: %w", err)
	}
	r, err := a.attachment(target)
	if err != nil {
		return err
	}
	if r.Mounts = change(r.Mounts); len(r.Mounts) == 0 {
		err := os.Remove(a.attachmentFile(target))
		if errors.Is(err, iofs.ErrNotExist) {
			return nil
		}
		return err
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return vfs.WriteFileAtomic(vfs.OS(), a.attachmentFile(target), append(data, '\n'))
}

// recordMount puts a mount on record, in place of a former one on the same folder.
func (a *app) recordMount(target string, m attachedMount) error {
	return a.changeAttachment(target, func(mounts []attachedMount) []attachedMount {
		if at := slices.IndexFunc(mounts, m.sameDir); at >= 0 && m.Lost { // which keeps its turn
			mounts[at] = m
			return mounts
		}
		return append(slices.DeleteFunc(mounts, m.sameDir), m)
	})
}

// recordLost puts on record what attach is to mount again, until it has.
func (a *app) recordLost(target string, lost []attachedMount) error {
	if len(lost) == 0 {
		return nil
	}
	return a.changeAttachment(target, func(mounts []attachedMount) []attachedMount {
		for _, m := range lost {
			m.Lost = true
			mounts = append(slices.DeleteFunc(mounts, m.sameDir), m)
		}
		return mounts
	})
}

// lostMounts returns what attach is to mount again, in the order of the first time.
func (a *app) lostMounts(target string) ([]attachedMount, error) {
	r, err := a.attachment(target)
	return slices.DeleteFunc(r.Mounts, func(m attachedMount) bool { return !m.Lost }), err
}

// forgetMount takes a mount off the record.
func (a *app) forgetMount(target string, m attachedMount) error {
	return a.changeAttachment(target, func(mounts []attachedMount) []attachedMount {
		return slices.DeleteFunc(mounts, m.sameDir)
	})
}

func (m attachedMount) sameDir(other attachedMount) bool { return m.Dir == other.Dir }

// attachments returns the records of all that is attached, by id.
func (a *app) attachments() (map[string]attachment, error) {
	files, err := globIn(a.attachDir(""), "*"+recordSuffix)
	if err != nil {
		return nil, fmt.Errorf("list what is attached: %w", err)
	}
	all := make(map[string]attachment)
	for _, file := range files {
		id := strings.TrimSuffix(filepath.Base(file), recordSuffix)
		if all[id], err = a.attachment(id); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// withFilesystems adds to the status of a device where attach mounted the filesystems in
// it. It only informs: what cannot be found out is left out.
func (a *app) withFilesystems(s statusJSON) statusJSON {
	r, err := a.attachment(s.ID)
	if err != nil || len(r.Mounts) == 0 {
		return s
	}
	mounted, err := fs.Mountpoints()
	if err != nil {
		return s
	}
	for _, m := range r.Mounts {
		if slices.ContainsFunc(mounted, func(at fs.Mountpoint) bool { return at.Dir == m.Dir && at.Source == m.Device }) {
			s.Filesystems = append(s.Filesystems, m.Dir)
		}
	}
	return s
}

// attachedDirs lists for a shell where attach mounted filesystems.
func (a *app) attachedDirs(context.Context, string) (dirs []cobra.Completion) {
	all, err := a.attachments()
	if err != nil {
		return nil
	}
	for id, r := range all {
		for _, m := range r.Mounts {
			dirs = append(dirs, described(m.Dir, id))
		}
	}
	return dirs
}
