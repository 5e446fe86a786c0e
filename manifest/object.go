package manifest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

var (
	// ErrVersion is wrapped by the error for an object or record that this build does not know how
	// to read: of another version, or with a flag that it does not know. The message names which.
	ErrVersion = errors.New("unknown format")
	// ErrCorrupt is wrapped by every other error for bytes that are not what they should be.
	ErrCorrupt = errors.New("corrupt")
)

const (
	// ObjectHeaderLen is the length in bytes of the header that every binary object begins with:
	// magic, version (u16) and flags (u16).
	ObjectHeaderLen = 8
	// ChecksumLen is the length in bytes of the CRC32C that follows what it covers.
	ChecksumLen = 4

	// flagSealed is that of objects sealed under their lineage's data key.
	flagSealed = 1 << 0
)

// castagnoli is the polynomial of CRC32C, for which CPUs have instructions. The table is made once
// by the library and never changes.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC32C (Castagnoli) of b.
func Checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// An ObjectFormat is one kind of binary object in one version: what its header says.
type ObjectFormat struct {
	Name    string // for messages
	Magic   string // the object's first 4 bytes
	Version uint16
}

// AppendHeader appends the object header, without flags.
func (f ObjectFormat) AppendHeader(b []byte) []byte { return f.appendHeader(b, 0) }

// AppendSealedHeader appends the header of an object that is sealed, which may be done in
// parts.
func (f ObjectFormat) AppendSealedHeader(b []byte) []byte { return f.appendHeader(b, flagSealed) }

func (f ObjectFormat) appendHeader(b []byte, flags uint16) []byte {
	b = append(b, f.Magic...)
	b = binary.LittleEndian.AppendUint16(b, f.Version)
	return binary.LittleEndian.AppendUint16(b, flags)
}

// CheckHeader is CheckSealed for an object that is not sealed, or was opened.
func (f ObjectFormat) CheckHeader(data []byte) error { return f.CheckSealed(data, false) }

// CheckSealed checks that data begins with the header of an object of this kind, sealed or not. Its
// error wraps [ErrVersion] if the kind is right and the version or a flag is not known, else
// [ErrCorrupt]. It is to be called before anything else is believed, the length and the checksum
// included: another version may lay them out differently.
func (f ObjectFormat) CheckSealed(data []byte, sealed bool) error {
	if len(data) < ObjectHeaderLen {
		return corrupt(f.Name, "%d bytes are too short for a header", len(data))
	}
	if string(data[:4]) != f.Magic {
		return corrupt(f.Name, "magic is %q, not %q", data[:4], f.Magic)
	}
	if v := binary.LittleEndian.Uint16(data[4:]); v != f.Version {
		return fmt.Errorf("%s: %w: version %d, and this build reads %d", f.Name, ErrVersion, v, f.Version)
	}
	switch flags := binary.LittleEndian.Uint16(data[6:]); {
	case flags == 0 && !sealed, flags == flagSealed && sealed:
		return nil
	case flags == 0:
		return corrupt(f.Name, "it is not sealed, though its lineage is encrypted")
	case flags == flagSealed:
		return fmt.Errorf("%s: %w: sealed (encrypted), though its lineage is not", f.Name, ErrVersion)
	default:
		return fmt.Errorf("%s: %w: flags %#04x, which this build does not know", f.Name, ErrVersion, flags)
	}
}

// AppendChecksum appends the CRC32C of all of b.
func (f ObjectFormat) AppendChecksum(b []byte) []byte {
	return binary.LittleEndian.AppendUint32(b, Checksum(b))
}

// CutChecksum checks the CRC32C that data ends with and returns what it covers. Its error wraps
// [ErrCorrupt].
func (f ObjectFormat) CutChecksum(data []byte) ([]byte, error) {
	if len(data) < ChecksumLen {
		return nil, corrupt(f.Name, "%d bytes are too short for a checksum", len(data))
	}
	body := data[:len(data)-ChecksumLen]
	if want, got := binary.LittleEndian.Uint32(data[len(body):]), Checksum(body); got != want {
		return nil, corrupt(f.Name, "checksum is %08x, not %08x", got, want)
	}
	return body, nil
}

// corrupt makes an error that wraps ErrCorrupt and says in what the corruption was found.
func corrupt(what, format string, args ...any) error {
	return fmt.Errorf("%s: %w: %s", what, ErrCorrupt, fmt.Sprintf(format, args...))
}
