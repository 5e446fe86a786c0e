// Package probe tells what a block device holds by the magic numbers at its
// beginning: which filesystem, or what else that is no filesystem.
//
// It exists because what blkid(8) says rests on caches, on udev and on how it was
// configured, and does not tell whether a log is to be replayed. It knows what
// Linux hosts and their disk images commonly have.
package probe

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"
)

// Length is how much of a device is looked at, in bytes: the furthest is the
// superblock of btrfs, at 64 KiB.
const Length = 68 << 10

// Content is what a device holds. The zero Content is nothing that is known.
type Content struct {
	// Type is the filesystem's as mount(8) has it, such as "ext4", or the name
	// that blkid(8) gives to what is no filesystem, such as "crypto_LUKS".
	Type string

	// Mountable reports whether it is a filesystem, and whole: not one of
	// several devices of one.
	Mountable bool

	// Label and UUID are the filesystem's own, "" if it has none or they are not
	// looked for. They come from the device and may hold anything printable.
	Label, UUID string

	// Dirty reports that the filesystem was not unmounted: its log has changes
	// that its blocks lack. Only ext3, ext4 and btrfs tell.
	Dirty bool

	// Table reports that there is a partition table, of GPT or the older kind.
	Table bool
}

// Probe looks at the first Length bytes of a device, which may be shorter.
func Probe(device io.ReaderAt) (Content, error) {
	head := make([]byte, Length)
	n, err := device.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return Content{}, fmt.Errorf("look for a filesystem: %w", err)
	}
	clear(head[n:])
	table := hasTable(head)
	for _, known := range formats {
		if at := known.offset; string(head[at:at+len(known.magic)]) != known.magic {
			continue
		}
		c := Content{Type: known.name, Mountable: known.mountable, Table: table}
		if known.details == nil || known.details(head, &c) {
			return c, nil
		}
	}
	return Content{Table: table}, nil
}

// bootSignature ends the first sector of what can be booted or is partitioned.
const bootSignature = "\x55\xaa"

// hasTable reports whether a device begins with a partition table: its first sector
// ends as it should, and has four entries that could be such, at least one of them used.
func hasTable(head []byte) bool {
	if string(head[510:512]) != bootSignature {
		return false
	}
	used := false
	for entry := range slices.Chunk(head[446:510], 16) {
		kind, sectors := entry[4], binary.LittleEndian.Uint32(entry[12:])
		if entry[0]&0x7f != 0 { // neither bootable nor not: it is code
			return false
		}
		used = used || kind != 0 && sectors != 0
	}
	return used
}

// A format is known by its magic number. details adds what else there is to say,
// and reports whether it is the format at all.
type format struct {
	name      string
	offset    int
	magic     string
	mountable bool
	details   func(head []byte, c *Content) bool
}

// formats are in the order in which they are looked for: containers first, as
// what was there before may still show behind their headers.
var formats = []format{
	{"crypto_LUKS", 0, "LUKS\xba\xbe", false, nil},
	{"LVM2_member", 512 + 24, "LVM2 001", false, nil},
	{"LVM2_member", 24, "LVM2 001", false, nil},
	{"linux_raid_member", 4096, "\xfc\x4e\x2b\xa9", false, nil}, // 1.2
	{"linux_raid_member", 0, "\xfc\x4e\x2b\xa9", false, nil},    // 1.1
	{"swap", 4096 - 10, "SWAPSPACE2", false, nil},
	{"swap", 4096 - 10, "SWAP-SPACE", false, nil},
	{"BitLocker", 3, "-FVE-FS-", false, nil},
	{"xfs", 0, "XFSB", true, xfs},
	{"squashfs", 0, "hsqs", true, nil},
	{"ntfs", 3, "NTFS    ", true, nil},
	{"exfat", 3, "EXFAT   ", true, nil},
	{"ext4", extOffset + 0x38, "\x53\xef", true, ext},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0", true, nil},
	{"f2fs", 1024, "\x10\x20\xf5\xf2", true, nil},
	{"btrfs", btrfsOffset + 0x40, "_BHRfS_M", true, btrfs},
	{"iso9660", 32769, "CD001", true, nil},
	{"vfat", 0x52, "FAT32   ", true, fat},
	{"vfat", 0x36, "FAT16   ", true, fat},
	{"vfat", 0x36, "FAT12   ", true, fat},
}

const (
	extOffset   = 1024
	btrfsOffset = 64 << 10
)

// Feature flags of ext2, ext3 and ext4 (fs/ext4/ext4.h of Linux).
const (
	extHasJournal    = 0x4 // compatible
	extFiletype      = 0x2 // incompatible
	extNeedsRecovery = 0x4
	extJournalDevice = 0x8
	extMetaGroups    = 0x10
	extSparse        = 0x1 // compatible if read-only
	extLargeFiles    = 0x2
	extBtree         = 0x4
)

func ext(head []byte, c *Content) bool {
	sb := head[extOffset:]
	compatible := binary.LittleEndian.Uint32(sb[0x5c:])
	incompatible := binary.LittleEndian.Uint32(sb[0x60:])
	readOnly := binary.LittleEndian.Uint32(sb[0x64:])
	if incompatible&extJournalDevice != 0 { // a journal by itself
		c.Type, c.Mountable = "jbd", false
		return true
	}
	journal := compatible&extHasJournal != 0
	old := incompatible&^(extFiletype|extNeedsRecovery|extMetaGroups) == 0 && readOnly&^(extSparse|extLargeFiles|extBtree) == 0
	switch {
	case old && journal:
		c.Type = "ext3"
	case old:
		c.Type = "ext2"
	}
	c.Dirty = journal && incompatible&extNeedsRecovery != 0
	c.UUID, c.Label = uuid(sb[0x68:]), label(sb[0x78:0x88])
	return true
}

func xfs(head []byte, c *Content) bool {
	c.UUID, c.Label = uuid(head[32:]), label(head[108:120])
	return true
}

func btrfs(head []byte, c *Content) bool {
	sb := head[btrfsOffset:]
	c.Mountable = binary.LittleEndian.Uint64(sb[0x88:]) <= 1 // devices
	c.Dirty = binary.LittleEndian.Uint64(sb[0x60:]) != 0     // the root of a log
	c.UUID, c.Label = uuid(sb[0x20:]), label(sb[0x12b:0x22b])
	return true
}

// fat looks twice: its magic number is text that a boot loader may have.
func fat(head []byte, c *Content) bool {
	sector := binary.LittleEndian.Uint16(head[11:])
	return string(head[510:512]) == bootSignature && (head[0] == 0xeb || head[0] == 0xe9) &&
		sector >= 512 && sector <= 4096 && sector&(sector-1) == 0
}

// uuid writes 16 bytes as people do.
func uuid(b []byte) string {
	b = b[:16]
	if len(bytes.Trim(b, "\x00")) == 0 {
		return ""
	}
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// label returns a padded label, without what a terminal does not print.
func label(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, strings.TrimSpace(string(b)))
}
