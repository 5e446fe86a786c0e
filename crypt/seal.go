package crypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
)

var (
	// ErrForged: what is sealed is not what was sealed, or was sealed as something
	// else, or under another key.
	ErrForged = errors.New("sealed bytes do not authenticate")

	// ErrUnsealed: an object is not sealed, though its lineage is encrypted.
	ErrUnsealed = errors.New("it is not sealed, though its lineage is encrypted")
)

const (
	// KeyLen is the length of a data key, in bytes.
	KeyLen = 32

	saltLen  = 32
	nonceLen = 12 // GCM's
	tagLen   = 16 // GCM's

	// Overhead is by how many bytes [Key.Seal] makes longer what it seals.
	Overhead = saltLen + tagLen

	// headerLen is the length of the header that every binary object begins with, and
	// flagsAt where in it the flags are.
	headerLen  = 8
	flagsAt    = 6
	flagSealed = 1 << 0

	// ObjectOverhead is by how many bytes [Key.SealObject] makes an object longer:
	// its header stays in clear in front of it.
	ObjectOverhead = headerLen + Overhead
)

// A Key is a lineage's data key. A nil Key is that of a lineage that is not
// encrypted: it seals nothing, and opens what is not sealed. It never changes, and its
// methods may be called concurrently.
//
// Each seal is under a key of its own, which HKDF-SHA-256 derives from the data key
// and 256 random bits that are kept beside what is sealed. So a nonce repeats under a
// key only if 256 random bits do, also across retries, resumed uploads, repairs and
// cloned machines.
type Key struct{ secret []byte }

// NewKey returns the Key of a data key, KeyLen bytes, of which it keeps a copy.
func NewKey(data []byte) (*Key, error) {
	if len(data) != KeyLen {
		return nil, fmt.Errorf("a data key of %d bytes, not %d", len(data), KeyLen)
	}
	return &Key{append([]byte(nil), data...)}, nil
}

// Overhead is by how many bytes Seal makes longer what it seals.
func (k *Key) Overhead() int {
	if k == nil {
		return 0
	}
	return Overhead
}

// ObjectOverhead is by how many bytes SealObject makes longer what it seals.
func (k *Key) ObjectOverhead() int {
	if k == nil {
		return 0
	}
	return ObjectOverhead
}

// Seal appends plain to dst, encrypted and bound to name: AES-256-GCM. The two may not
// overlap.
func (k *Key) Seal(dst, name, plain []byte) []byte {
	if k == nil {
		return append(dst, plain...)
	}
	salt := make([]byte, saltLen)
	rand.Read(salt) // never fails: crypto/rand
	return k.once(salt).Seal(append(dst, salt...), make([]byte, nonceLen), plain, name)
}

// Open appends to dst what Seal was given with the same name. The error is ErrForged,
// and then what lies beyond dst's length is undefined.
func (k *Key) Open(dst, name, sealed []byte) ([]byte, error) {
	if k == nil {
		return append(dst, sealed...), nil
	}
	if len(sealed) < Overhead {
		return dst, fmt.Errorf("%w: %d bytes", ErrForged, len(sealed))
	}
	plain, err := k.once(sealed[:saltLen]).Open(dst, make([]byte, nonceLen), sealed[saltLen:], name)
	if err != nil {
		return dst, ErrForged
	}
	return plain, nil
}

// SealObject seals a binary object, bound to name: its header with the flag for
// sealed, and behind that what Seal makes of all of it. Without a key it is the object
// itself.
func (k *Key) SealObject(name string, object []byte) []byte {
	if k == nil {
		return object
	}
	header := append(make([]byte, 0, ObjectOverhead+len(object)), object[:headerLen]...)
	header[flagsAt] |= flagSealed
	return k.Seal(header, objectName(name, header), object)
}

// OpenObject is the inverse of SealObject. Without a key it is the object itself,
// which its decoder refuses if it is sealed. The error is ErrForged or ErrUnsealed.
func (k *Key) OpenObject(name string, data []byte) ([]byte, error) {
	if k == nil {
		return data, nil
	}
	if len(data) < ObjectOverhead {
		return nil, fmt.Errorf("%w: %d bytes", ErrForged, len(data))
	}
	if data[flagsAt]&flagSealed == 0 {
		return nil, ErrUnsealed
	}
	return k.Open(nil, objectName(name, data), data[headerLen:])
}

func objectName(name string, header []byte) []byte {
	return append([]byte("object "+name+" "), header[:headerLen]...)
}

// once returns the cipher of a salt, under which one message is sealed: so all have
// the same nonce, zeros.
func (k *Key) once(salt []byte) cipher.AEAD { return newGCM(k.derive(salt, "seal", KeyLen)) }

// derive returns n bytes of key for one purpose.
func (k *Key) derive(salt []byte, purpose string, n int) []byte {
	key, err := hkdf.Key(sha256.New, k.secret, salt, "lazyvol 1 "+purpose, n)
	if err != nil {
		panic(fmt.Sprintf("crypt: derive %d bytes: %v", n, err)) // only if n is too large
	}
	return key
}

func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(fmt.Sprintf("crypt: %v", err)) // only if the length is wrong
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		panic(fmt.Sprintf("crypt: %v", err))
	}
	return gcm
}
