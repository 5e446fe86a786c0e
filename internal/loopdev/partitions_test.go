package loopdev

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// addPartitions makes partitions of a device, whatever tables the kernel can read.
func addPartitions(t *testing.T, dev string) {
	t.Helper()
	c := exec.Command("sfdisk", "-q", "-X", "gpt", dev)
	c.Stdin = strings.NewReader("start=2048,size=2048\nstart=4096,size=1024\n")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
	if found, err := Partitions(dev); err != nil || len(found) == 0 {
		run(t, "partx", "--add", dev)
	}
}

func TestPartitionsAreFoundAndHaveNodes(t *testing.T) {
	dev := attach(t, backing(t, 0), Options{PartScan: true})
	if found, err := Partitions(dev); len(found) != 0 || err != nil {
		t.Errorf("of an empty device: %+v, %v", found, err)
	}
	addPartitions(t, dev)
	found, err := Partitions(dev)
	if err != nil || len(found) != 2 {
		t.Fatalf("%+v, %v", found, err)
	}
	for i, want := range []Partition{{Number: 1, Path: dev + "p1", Size: 1 << 20}, {Number: 2, Path: dev + "p2", Size: 512 << 10}} {
		if want.Name = found[i].Name; found[i] != want {
			t.Errorf("%+v, want %+v", found[i], want)
		}
	}
	numbers, err := Numbers(dev)
	if err != nil || len(numbers) != 3 {
		t.Errorf("numbers %q, %v", numbers, err)
	}
	for _, p := range found {
		if _, err := os.ReadFile(p.Path); err != nil {
			t.Error(err)
		}
	}
	attached, err := Attached()
	if err != nil || !slices.Contains(attached, dev) {
		t.Errorf("attached are %q, %v", attached, err)
	}
}

// A node that a former partition left would be read in its place.
func TestNodeOfAFormerPartitionIsReplaced(t *testing.T) {
	node := filepath.Join(t.TempDir(), "loop7p1")
	number := func() uint64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(node, &st); err != nil {
			t.Fatal(err)
		}
		return st.Rdev
	}
	for _, n := range []string{"7:200", "7:201", "7:201"} {
		if err := makeNode(node, n); err != nil {
			t.Fatal(err)
		}
	}
	if got := number(); got != unix.Mkdev(7, 201) {
		t.Errorf("the node is of %d:%d", unix.Major(got), unix.Minor(got))
	}
	if err := makeNode(node, "nonsense"); err == nil {
		t.Error("nonsense is no number")
	}
}

func TestDifferencesAreTold(t *testing.T) {
	o := Options{ReadAheadKB: 2048, PartScan: true}
	dev := attach(t, backing(t, 0), o)
	if d, err := Check(dev, o); len(d) != 0 || err != nil {
		t.Errorf("as attached: %q, %v", d, err)
	}
	run(t, "losetup", "--direct-io=off", dev)
	if err := os.WriteFile(attributePath(dev, "queue/read_ahead_kb"), []byte("128"), 0); err != nil {
		t.Fatal(err)
	}
	d, err := Check(dev, o)
	if err != nil || len(d) != 2 || !strings.Contains(d[0], "direct I/O is off") || !strings.Contains(d[1], "128 KiB, not 2048") {
		t.Errorf("changed: %q, %v", d, err)
	}
	plain := attach(t, backing(t, 0), Options{})
	if d, err := Check(plain, Options{PartScan: true}); err != nil || len(d) != 1 || !strings.Contains(d[0], "partitions") {
		t.Errorf("without partitions: %q, %v", d, err)
	}
	if d, err := Check("/dev/loop-none", o); err == nil {
		t.Errorf("of no device: %q", d)
	}
}

func TestReleasedDeviceGoesWithItsLastUser(t *testing.T) {
	file := backing(t, 1)
	dev := attach(t, file, Options{})
	dir := mount(t, dev)
	if err := Release(dev); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("written meanwhile"), 0o600); err != nil {
		t.Error(err)
	}
	if now, err := Backing(dev); err != nil || now != file {
		t.Errorf("in use it is attached to %q, %v", now, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := awaitGone(dev, file); err != nil {
		t.Errorf("unused: %v", err)
	}
	again := attach(t, file, Options{})
	if err := unix.Mount(again, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "file")); string(data) != "written meanwhile" {
		t.Errorf("%q, %v", data, err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := Release(again); err != nil {
		t.Fatal(err)
	}
	if err := awaitGone(again, file); err != nil {
		t.Errorf("never used: %v", err)
	}
	if err := Release(again); !errors.Is(err, ErrNotAttached) {
		t.Errorf("again: %v", err)
	}
}
