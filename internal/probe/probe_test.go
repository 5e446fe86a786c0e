package probe

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/internal/loopdev/loopdevtest"
)

func TestMain(m *testing.M) {
	loopdevtest.Lock() // mkfs.btrfs fails if a loop device has its file on a dead mount
	goleak.VerifyTestMain(m)
}

const id = "01234567-89ab-cdef-0123-456789abcdef"

// What the tools of each format make is known for what it is.
func TestWhatMkfsMakesIsKnown(t *testing.T) {
	for name, c := range map[string]struct {
		mkfs []string // its file is appended
		want Content
	}{
		"ext2":  {[]string{"mkfs.ext2", "-q", "-U", id, "-L", "disk"}, Content{"ext2", true, "disk", id, false, false}},
		"ext3":  {[]string{"mkfs.ext3", "-q", "-U", id, "-L", "disk"}, Content{"ext3", true, "disk", id, false, false}},
		"ext4":  {[]string{"mkfs.ext4", "-q", "-U", id, "-L", "a longer label"}, Content{"ext4", true, "a longer label", id, false, false}},
		"xfs":   {[]string{"mkfs.xfs", "-q", "-m", "uuid=" + id, "-L", "twelve chars"}, Content{"xfs", true, "twelve chars", id, false, false}},
		"btrfs": {[]string{"mkfs.btrfs", "-q", "-U", id, "-L", "disk"}, Content{"btrfs", true, "disk", id, false, false}},
		"swap":  {[]string{"mkswap"}, Content{Type: "swap"}},
		"gpt":   {[]string{"sh", "-c", `echo size=8MiB | sfdisk -q -X gpt "$0"`}, Content{Table: true}},
		"mbr":   {[]string{"sh", "-c", `echo size=8MiB | sfdisk -q -X dos "$0"`}, Content{Table: true}},
	} {
		t.Run(name, func(t *testing.T) {
			got := probe(t, image(t, c.mkfs...))
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A second superblock of the same place must not hide what was made later: a
// device that had a filesystem is another one's now.
func TestNewestFormatIsFound(t *testing.T) {
	for _, make := range [][2]string{{"mkfs.ext4", "mkfs.xfs"}, {"mkfs.xfs", "mkfs.ext4"}, {"mkfs.xfs", "mkfs.btrfs"}, {"mkfs.btrfs", "mkswap"}} {
		file := image(t, make[0], "-q")
		if make[1] == "mkswap" {
			run(t, "mkswap", "-f", file)
		} else {
			run(t, make[1], map[string]string{"mkfs.ext4": "-F", "mkfs.xfs": "-f", "mkfs.btrfs": "-f"}[make[1]], "-q", file)
		}
		want := map[string]string{"mkfs.ext4": "ext4", "mkfs.xfs": "xfs", "mkfs.btrfs": "btrfs", "mkswap": "swap"}[make[1]]
		if got := probe(t, file); got.Type != want {
			t.Errorf("%s after %s: %+v", make[1], make[0], got)
		}
	}
}

func TestFilesystemThatWasNotUnmountedIsDirty(t *testing.T) {
	file := image(t, "mkfs.ext4", "-q")
	run(t, "debugfs", "-w", "-R", "feature needs_recovery", file)
	if got := probe(t, file); !got.Dirty || got.Type != "ext4" {
		t.Errorf("%+v", got)
	}
}

// What no tool here makes, by its bytes.
func TestOtherFormatsAreKnownByTheirMagic(t *testing.T) {
	bootSector := func(at int, magic string) []byte {
		b := make([]byte, 512)
		copy(b, "\xeb\x3c\x90mkfs.fat\x00\x02")
		copy(b[at:], magic)
		copy(b[510:], "\x55\xaa")
		return b
	}
	at := func(offset int, magic string) []byte { return append(make([]byte, offset), magic...) }
	notFAT := bootSector(0x36, "FAT16   ")
	notFAT[0] = 0
	for name, c := range map[string]struct {
		head []byte
		want Content
	}{
		"nothing":        {nil, Content{}},
		"zeros":          {make([]byte, Length), Content{}},
		"fat32":          {bootSector(0x52, "FAT32   "), Content{Type: "vfat", Mountable: true}},
		"fat16":          {bootSector(0x36, "FAT16   "), Content{Type: "vfat", Mountable: true}},
		"no boot sector": {notFAT, Content{}},
		"luks":           {at(0, "LUKS\xba\xbe\x00\x02"), Content{Type: "crypto_LUKS"}},
		"lvm":            {at(536, "LVM2 001"), Content{Type: "LVM2_member"}},
		"raid":           {at(4096, "\xfc\x4e\x2b\xa9"), Content{Type: "linux_raid_member"}},
		"ntfs":           {at(3, "NTFS    "), Content{Type: "ntfs", Mountable: true}},
		"iso":            {at(32769, "CD001"), Content{Type: "iso9660", Mountable: true}},
		"btrfs of two": {append(at(btrfsOffset+0x40, "_BHRfS_M"), append(make([]byte, 0x40), 2)...),
			Content{Type: "btrfs"}},
		"cut off": {at(0, "XFS"), Content{}},
	} {
		got, err := Probe(bytes.NewReader(c.head))
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
}

type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error) { return 0, errBroken }

var errBroken = errors.New("broken")

func TestUnreadableDeviceIsNotAnEmptyOne(t *testing.T) {
	if c, err := Probe(broken{}); !errors.Is(err, errBroken) || c != (Content{}) {
		t.Errorf("%+v, %v", c, err)
	}
}

// Whatever a device holds, there is an answer that a terminal can show.
func FuzzProbe(f *testing.F) {
	f.Add(append(make([]byte, 1024+0x38), 0x53, 0xef), 0)
	f.Add([]byte("XFSB"), 0)
	f.Add([]byte("_BHRfS_M\xff\x1b[2J"), btrfsOffset+0x40)
	f.Fuzz(func(t *testing.T, data []byte, offset int) {
		if offset < 0 || offset > Length {
			return
		}
		c, err := Probe(io.NewSectionReader(bytes.NewReader(append(make([]byte, offset), data...)), 0, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		if c.Mountable && c.Type == "" {
			t.Errorf("%+v", c)
		}
		if strings.ContainsFunc(c.Label+c.UUID+c.Type, unicode.IsControl) {
			t.Errorf("%q", c.Label)
		}
	})
}

// image makes a file with a filesystem.
func image(t *testing.T, mkfs ...string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 320<<20)); err != nil {
		t.Fatal(err)
	}
	run(t, mkfs[0], append(mkfs[1:], file)...)
	return file
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

func probe(t *testing.T, file string) Content {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := Probe(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
