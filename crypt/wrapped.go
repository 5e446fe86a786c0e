package crypt

import (
	"encoding/binary"
	"fmt"
)

// What wrapped a data key is told by the magic of the wrapped key.
const (
	magicByFile = "LVWF"
	magicByKMS  = "LVWK"

	wrappedVersion = 1

	fileKeyIDLen    = 16
	fileSealedLen   = nonceLen + KeyLen + tagLen
	wrappedByFile   = headerLen + fileKeyIDLen + fileSealedLen
	maxKMSBlob      = 6144 // https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html
	maxWrappedByKMS = headerLen + maxKMSBlob
)

// wrappedHeader begins a wrapped key. There is room for n bytes after it.
func wrappedHeader(magic string, n int) []byte {
	b := make([]byte, 0, headerLen+n)
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint16(b, wrappedVersion)
	return binary.LittleEndian.AppendUint16(b, 0)
}

// openWrapped returns what follows the header of a key wrapped by what magic stands
// for: a part of wrapped.
func openWrapped(wrapped []byte, magic string) ([]byte, error) {
	if len(wrapped) < headerLen {
		return nil, fmt.Errorf("%w: a wrapped key has more than %d bytes", ErrKeyFormat, len(wrapped))
	}
	got := string(wrapped[:4])
	switch by := wrapperName(got); {
	case by == "":
		return nil, fmt.Errorf("%w: these %d bytes are no wrapped key", ErrKeyFormat, len(wrapped))
	case got != magic:
		return nil, fmt.Errorf("%w: the data key was wrapped by %s, not by %s", ErrWrongKey, by, wrapperName(magic))
	}
	if v := binary.LittleEndian.Uint16(wrapped[4:]); v != wrappedVersion {
		return nil, fmt.Errorf("%w: the wrapped key is of version %d, and this build knows %d only", ErrKeyFormat, v, wrappedVersion)
	}
	if flags := binary.LittleEndian.Uint16(wrapped[6:]); flags != 0 {
		return nil, fmt.Errorf("%w: the wrapped key has flags %#x, and this build knows none", ErrKeyFormat, flags)
	}
	return wrapped[headerLen:], nil
}

func wrapperName(magic string) string {
	switch magic {
	case magicByFile:
		return "a key file"
	case magicByKMS:
		return "AWS KMS"
	}
	return ""
}

// fileWrapped is a data key wrapped by a key file.
type fileWrapped struct {
	bound  []byte // the header and the key's id: a part of the additional data
	id     [fileKeyIDLen]byte
	sealed []byte // nonce, ciphertext, tag
}

// decodeFileWrapped returns parts of wrapped.
func decodeFileWrapped(wrapped []byte) (fileWrapped, error) {
	body, err := openWrapped(wrapped, magicByFile)
	if err != nil {
		return fileWrapped{}, err
	}
	if len(wrapped) != wrappedByFile {
		return fileWrapped{}, fmt.Errorf("%w: the wrapped key has %d bytes instead of %d", ErrKeyFormat, len(wrapped), wrappedByFile)
	}
	w := fileWrapped{bound: wrapped[:headerLen+fileKeyIDLen], sealed: body[fileKeyIDLen:]}
	copy(w.id[:], body)
	return w, nil
}

// encodeKMSWrapped wraps what KMS made of a data key.
func encodeKMSWrapped(blob []byte) []byte {
	return append(wrappedHeader(magicByKMS, len(blob)), blob...)
}

// decodeKMSWrapped returns a part of wrapped.
func decodeKMSWrapped(wrapped []byte) ([]byte, error) {
	blob, err := openWrapped(wrapped, magicByKMS)
	if err != nil {
		return nil, err
	}
	if len(blob) == 0 || len(wrapped) > maxWrappedByKMS {
		return nil, fmt.Errorf("%w: the wrapped key has %d bytes, and not %d to %d", ErrKeyFormat, len(wrapped), headerLen+1, maxWrappedByKMS)
	}
	return blob, nil
}
