package crypt

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const (
	// maxKeyFile is the length in bytes of the longest key file, comments included.
	maxKeyFile = 4 << 10

	keyFileVersion = 1
	keyFileComment = "# A key of lazyvol. Keep it secret, and keep a copy: nothing sealed under it can be\n" +
		"# read without it.\n"
)

// keyFile is what a key file holds.
type keyFile struct {
	id  [fileKeyIDLen]byte // random: it tells nothing about the key
	key [KeyLen]byte
}

// CreateKeyFile makes a key file with a new random key, which only its owner may
// read, and returns the URI that names it and the key's id. It does not replace
// what is there (fs.ErrExist). The file and its name are durable on return; after
// an error there is none, and after a crash perhaps one that is damaged.
func CreateKeyFile(path string) (uri, id string, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return "", "", fmt.Errorf("create key file %s: %w", path, err)
	}
	uri = keyURI{path: path}.String()
	if err := ValidateURI(uri); err != nil { // nothing could name the file
		return "", "", err
	}
	var f keyFile
	defer f.wipe()
	rand.Read(f.id[:])
	rand.Read(f.key[:])
	text := f.encode()
	defer clear(text)
	if err := createDurably(path, text); err != nil {
		return "", "", fmt.Errorf("create key file: %w", err)
	}
	return uri, hex.EncodeToString(f.id[:]), nil
}

func createDurably(path string, data []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	err = errors.Join(err, file.Close())
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// generateByFile draws a data key and wraps it with the key in a file.
func generateByFile(path, lineage string) (plain, wrapped []byte, err error) {
	f, err := readKeyFile(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.wipe()
	aead, err := f.aead()
	if err != nil {
		return nil, nil, err
	}
	plain = make([]byte, KeyLen)
	rand.Read(plain)
	bound := append(wrappedHeader(magicByFile, fileKeyIDLen+fileSealedLen), f.id[:]...)
	return plain, aead.Seal(bound, nil, plain, additionalData(bound, lineage)), nil
}

func unwrapByFile(path string, wrapped []byte, lineage string) ([]byte, error) {
	w, err := decodeFileWrapped(wrapped)
	if err != nil {
		return nil, err
	}
	f, err := readKeyFile(path)
	if err != nil {
		return nil, err
	}
	defer f.wipe()
	if f.id != w.id {
		return nil, fmt.Errorf("%w: the data key was wrapped by key id %x, but %s holds key id %x", ErrWrongKey, w.id, path, f.id)
	}
	aead, err := f.aead()
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nil, w.sealed, additionalData(w.bound, lineage))
	if err != nil { // which tells nothing more
		return nil, fmt.Errorf("%w: key id %x did not wrap these bytes for this lineage: they are another's, or damaged", ErrWrongKey, f.id)
	}
	return plain, nil
}

// aead returns a cipher that draws a nonce by itself and puts it first. A key file
// wraps a data key a lineage; 2³² of them would be too many for random nonces.
func (f *keyFile) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(f.key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// additionalData is what a key wrapped by a file is bound to.
func additionalData(bound []byte, lineage string) []byte {
	return append(bytes.Clone(bound), lineage...)
}

func (f *keyFile) wipe() { clear(f.key[:]) }

// readKeyFile reads a file that its owner alone may read. The caller wipes what
// it returns.
func readKeyFile(path string) (*keyFile, error) {
	// O_NONBLOCK: a named pipe must not hold up the open.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w on this host: %w", ErrKeyNotFound, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: %w", ErrKeyDenied, err)
	case err != nil:
		return nil, err
	}
	defer file.Close() // nothing was written to it
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrKeyFormat, path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("%w: not only its owner has a right to the key file (its mode is %04o): run chmod 600 %q", ErrKeyDenied, perm, path)
	}
	data := make([]byte, maxKeyFile+1)
	defer clear(data)
	n, err := io.ReadFull(file, data)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return nil, err
	}
	f, err := decodeKeyFile(data[:n])
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	return f, nil
}

// encode returns the text of a key file. The caller clears it.
func (f *keyFile) encode() []byte {
	b := make([]byte, 0, 512) // never grown, which would leave a copy behind
	b = append(b, keyFileComment...)
	b = fmt.Appendf(b, "lazyvol-key %d\nid %x\nkey ", keyFileVersion, f.id)
	b = hex.AppendEncode(b, f.key[:])
	return fmt.Appendf(b, "\ncrc32c %08x\n", f.checksum())
}

// checksum tells a damaged key from a wrong one.
func (f *keyFile) checksum() uint32 {
	table := crc32.MakeTable(crc32.Castagnoli)
	return crc32.Update(crc32.Checksum(f.id[:], table), table, f.key[:])
}

// decodeKeyFile is the inverse of encode. It ignores comments, empty lines, and
// what white space an editor may have left. The caller wipes what it returns.
func decodeKeyFile(data []byte) (*keyFile, error) {
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%w: a key file has at most %d bytes", ErrKeyFormat, maxKeyFile)
	}
	var lines [][]byte
	for line := range bytes.Lines(data) {
		if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("%w: the file is empty", ErrKeyFormat)
	}
	version, ok := bytes.CutPrefix(lines[0], []byte("lazyvol-key "))
	if !ok {
		return nil, fmt.Errorf("%w: the file is no key file of lazyvol", ErrKeyFormat)
	}
	if n, err := strconv.ParseUint(string(version), 10, 16); err != nil {
		return nil, fmt.Errorf("%w: its first line has no version", ErrKeyFormat)
	} else if n != keyFileVersion {
		return nil, fmt.Errorf("%w: the key file is of version %d, and this build knows %d only", ErrKeyFormat, n, keyFileVersion)
	}
	if len(lines) != 4 {
		return nil, fmt.Errorf("%w: the key file is damaged: it has %d lines instead of 4", ErrKeyFormat, len(lines))
	}
	f := new(keyFile)
	var sum [4]byte
	for i, field := range []struct {
		name string
		to   []byte
	}{{"id", f.id[:]}, {"key", f.key[:]}, {"crc32c", sum[:]}} {
		digits, ok := bytes.CutPrefix(lines[i+1], []byte(field.name+" "))
		if ok && len(digits) == 2*len(field.to) {
			_, err := hex.Decode(field.to, digits)
			ok = err == nil // which would quote a digit
		} else {
			ok = false
		}
		if !ok {
			f.wipe()
			return nil, fmt.Errorf("%w: the key file is damaged: want a line '%s' with %d hex digits", ErrKeyFormat, field.name, 2*len(field.to))
		}
	}
	if want := fmt.Sprintf("%08x", f.checksum()); hex.EncodeToString(sum[:]) != want {
		f.wipe()
		return nil, fmt.Errorf("%w: the key file is damaged: its checksum does not match", ErrKeyFormat)
	}
	return f, nil
}
