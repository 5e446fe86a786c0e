package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestReadOnlyFilesystemsLeaveTheirJournalsAlone(t *testing.T) {
	for _, c := range []struct {
		kind     string
		readOnly bool
		more     string
		want     string
	}{
		{"ext4", true, "", "ro,nosuid,nodev,noload,errors=remount-ro"},
		{"ext3", true, "", "ro,nosuid,nodev,noload,errors=remount-ro"},
		{"ext2", true, "", "ro,nosuid,nodev,errors=remount-ro"},
		{"xfs", true, "noatime", "ro,nosuid,nodev,norecovery,nouuid,noatime"},
		{"btrfs", true, "subvol=@", "ro,nosuid,nodev,rescue=nologreplay,subvol=@"},
		{"vfat", true, "suid", "ro,nosuid,nodev,suid"},
		{"ext4", false, "", "rw"},
		{"xfs", false, "ro", "rw,ro"},
	} {
		if got := mountOptions(c.kind, c.readOnly, c.more); got != c.want {
			t.Errorf("%s, read-only %t: %q, want %q", c.kind, c.readOnly, got, c.want)
		}
	}
}

// What was mounted in another boot is not mounted in this one.
func TestRecordOfMountsEndsWithTheBoot(t *testing.T) {
	a := &app{state: t.TempDir()}
	const target = "vol-0123456789abcdef0"
	if err := os.MkdirAll(a.attachDir(""), 0o700); err != nil {
		t.Fatal(err)
	}
	one, two := attachedMount{Dir: "/mnt/a", Device: "/dev/loop1"}, attachedMount{Dir: "/mnt/b", Device: "/dev/loop1p2", Partition: 2}
	for _, m := range []attachedMount{one, two, one} {
		if err := a.recordMount(target, m); err != nil {
			t.Fatal(err)
		}
	}
	r, err := a.attachment(target)
	if err != nil || !slices.Equal(r.Mounts, []attachedMount{two, one}) {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := a.forgetMount(target, one); err != nil {
		t.Fatal(err)
	}
	if r, err := a.attachment(target); err != nil || !slices.Equal(r.Mounts, []attachedMount{two}) {
		t.Fatalf("%+v, %v", r, err)
	}
	write(t, a.attachmentFile(target), `{"boot": "another", "mounts": [{"dir": "/mnt/b", "device": "/dev/loop1p2"}]}`)
	if r, err := a.attachment(target); err != nil || len(r.Mounts) != 0 || r.Boot == "another" {
		t.Errorf("%+v, %v", r, err)
	}
	write(t, a.attachmentFile(target), `{"boot`)
	if r, err := a.attachment(target); err == nil {
		t.Errorf("a damaged record is %+v", r)
	}
	write(t, a.attachmentFile(target), `{}`)
	if err := a.forgetAll(target); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(a.attachDir(""), "*")); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
