package cache

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

const (
	// recordsMagic is the first line of a file of records.
	recordsMagic = "lazyvol records 1\n"

	// maxRecordsLength bounds such a file, in bytes: enough for some 50,000
	// snapshots.
	maxRecordsLength = 64 << 20
)

// Records keeps small records of stores in files, one for each store, as lines:
//
//	<CRC32C of the rest of the line, 8 hex digits> <name, base64> <record, base64>
//
// They can be had from the store again, so that whatever is amiss with a file, or
// with a line of it, is as if it were not there. Any number of processes may use
// one folder.
type Records struct {
	FS     vfs.FS
	Folder string
	Log    *slog.Logger
}

// Load returns the records kept of a store, by name.
func (r Records) Load(store string) map[string][]byte {
	records := make(map[string][]byte)
	data, err := vfs.ReadFile(r.FS, r.file(store), maxRecordsLength)
	if errors.Is(err, fs.ErrNotExist) {
		return records
	}
	text, ok := bytes.CutPrefix(data, []byte(recordsMagic))
	if err != nil || !ok {
		r.Log.Debug("cannot use the cached records", "store", store, "error", err)
		return records
	}
	for line := range bytes.Lines(text) {
		if name, record, ok := decodeRecordLine(line); ok {
			records[name] = record
		}
	}
	return records
}

// Save replaces the records kept of a store. Those that the bound leaves no room
// for are not kept. If another process saves at the same time, either's are.
func (r Records) Save(store string, records map[string][]byte) {
	if err := r.save(store, records); err != nil {
		r.Log.Debug("cannot cache records", "store", store, "error", err)
	}
}

func (r Records) save(store string, records map[string][]byte) (err error) {
	if err := r.FS.MkdirAll(r.Folder, 0o700); err != nil {
		return err
	}
	// The lock is what WriteFileAtomic asks for: one writer.
	lock, err := r.FS.Lock(r.file(store)+".lock", true)
	if errors.Is(err, vfs.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	data := []byte(recordsMagic)
	for _, name := range slices.Sorted(maps.Keys(records)) {
		before := len(data)
		if data = appendRecordLine(data, name, records[name]); len(data) > maxRecordsLength {
			data = data[:before]
			break
		}
	}
	return vfs.WriteFileAtomic(r.FS, r.file(store), data)
}

// file is where the records of a store lie. Its id is hex digits.
func (r Records) file(store string) string { return filepath.Join(r.Folder, store) }

// recordLinePrefix is how long a line's checksum and the space behind it are.
const recordLinePrefix = 9

func appendRecordLine(data []byte, name string, record []byte) []byte {
	start := len(data)
	data = append(data, "00000000 "...)
	data = base64.StdEncoding.AppendEncode(data, []byte(name))
	data = append(data, ' ')
	data = base64.StdEncoding.AppendEncode(data, record)
	copy(data[start:], fmt.Sprintf("%08x", crc32.Checksum(data[start+recordLinePrefix:], castagnoli)))
	return append(data, '\n')
}

func decodeRecordLine(line []byte) (name string, record []byte, ok bool) {
	line, ended := bytes.CutSuffix(line, []byte("\n"))
	if !ended || len(line) < recordLinePrefix {
		return "", nil, false
	}
	sum, text := line[:recordLinePrefix-1], line[recordLinePrefix:]
	if string(sum) != fmt.Sprintf("%08x", crc32.Checksum(text, castagnoli)) {
		return "", nil, false
	}
	first, second, ok := bytes.Cut(text, []byte(" "))
	if !ok {
		return "", nil, false
	}
	decodedName, errName := base64.StdEncoding.AppendDecode(nil, first)
	record, errRecord := base64.StdEncoding.AppendDecode(nil, second)
	return string(decodedName), record, errName == nil && errRecord == nil
}
