package snapshot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sysfs makes a tree as the kernel's: a disk with two partitions, of which LVM
// holds the second, with a crypt device on that; and another disk.
func sysfs(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	device := func(number, path string) {
		t.Helper()
		dir := filepath.Join(root, "devices", path)
		if err := os.MkdirAll(filepath.Join(dir, "holders"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "dev"), []byte(number+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(root, "dev/block"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(dir, filepath.Join(root, "dev/block", number)); err != nil {
			t.Fatal(err)
		}
	}
	hold := func(held, holder string) {
		t.Helper()
		link := filepath.Join(root, "devices", held, "holders", filepath.Base(holder))
		if err := os.Symlink(filepath.Join(root, "devices", holder), link); err != nil {
			t.Fatal(err)
		}
	}
	device("8:0", "sda")
	for i, name := range []string{"sda1", "sda2"} {
		device([]string{"8:1", "8:2"}[i], "sda/"+name)
		if err := os.WriteFile(filepath.Join(root, "devices/sda", name, "partition"), []byte("1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	device("8:16", "sdb")
	device("253:0", "dm-0")
	device("253:1", "dm-1")
	hold("sda/sda2", "dm-0")
	hold("dm-0", "dm-1")
	return filepath.Join(root, "dev/block")
}

func TestDependantsOfADevice(t *testing.T) {
	tree := sysfs(t)
	for device, want := range map[string][]string{
		"8:0":   {"8:0", "8:1", "8:2", "253:0", "253:1"},
		"8:1":   {"8:1"},
		"8:2":   {"8:2", "253:0", "253:1"},
		"253:0": {"253:0", "253:1"},
		"8:16":  {"8:16"},
		"7:0":   {"7:0"}, // not in sysfs
	} {
		got := make(map[string]bool)
		if err := addDependants(tree, device, got); err != nil {
			t.Fatal(err)
		}
		set := make(map[string]bool)
		for _, d := range want {
			set[d] = true
		}
		if diff := cmp.Diff(set, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", device, diff)
		}
	}
}

func TestMountinfo(t *testing.T) {
	const mountinfo = `22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
23 22 0:5 / /dev rw,nosuid - devtmpfs udev rw,size=1k
24 22 253:1 / /mnt/with\040space\134 ro,relatime shared:9 master:1 - xfs /dev/mapper/a\040b rw,attr2
25 22 8:16 / /mnt/readonly ro - ext4 /dev/sdb ro,noload
26 22 0:40 /sub /mnt/btrfs rw - btrfs /dev/sdc rw,space_cache
27 22 0:41 / /mnt/nothing rw - tmpfs  rw
`
	for device, want := range map[string]string{
		"8:1":   "/",
		"253:1": `/mnt/with space\`, // a read-only mountpoint of a filesystem that is written
		"8:16":  "",
		"9:9":   "",
	} {
		got, err := findReadWrite(strings.NewReader(mountinfo), func(number, _ string) (bool, error) { return number == device, nil })
		if err != nil || got != want {
			t.Errorf("%s is mounted at %q, %v", device, got, err)
		}
	}
	for source, want := range map[string]string{"/dev/sdc": "/mnt/btrfs", "/dev/mapper/a b": `/mnt/with space\`, "": "/mnt/nothing"} {
		got, err := findReadWrite(strings.NewReader(mountinfo), func(_, s string) (bool, error) { return s == source, nil })
		if err != nil || got != want {
			t.Errorf("%s is mounted at %q, %v", source, got, err)
		}
	}
	for _, bad := range []string{"x\n", "1 2 3:4 / / rw\n", "1 2 3:4 / / rw - ext4 /dev/x\n"} {
		if _, err := findReadWrite(strings.NewReader(bad), func(string, string) (bool, error) { return true, nil }); err == nil {
			t.Errorf("understood %q", bad)
		}
	}
}
