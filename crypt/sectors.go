package crypt

import (
	"bytes"
	"crypto/aes"
	"crypto/rand"
	"fmt"

	"golang.org/x/crypto/xts"
)

const (
	// SectorLen is the length of a sector, in bytes: what a disk writes as a whole.
	SectorLen = 512

	// SectorSaltLen is the length of the salt of [Key.Sectors], in bytes.
	SectorSaltLen = 16
)

// Sectors encrypts the sectors of one layer of written bytes on a host, with
// AES-256-XTS: as long as they were and with nothing beside them, so that a sector is
// whole whichever version of it a power cut leaves. That keeps them secret; it does not
// tell whether they are what was written. It never changes, and its methods may be
// called concurrently.
type Sectors struct{ cipher *xts.Cipher }

// NewSectorSalt draws the salt of a layer.
func NewSectorSalt() []byte {
	salt := make([]byte, SectorSaltLen)
	rand.Read(salt) // never fails: crypto/rand
	return salt
}

// Sectors returns what encrypts the sectors of the layer with a salt.
func (k *Key) Sectors(salt []byte) *Sectors {
	const keys = 2 // XTS has one for the sector and one for its number
	c, err := xts.NewCipher(aes.NewCipher, k.derive(salt, "sectors", keys*KeyLen))
	if err != nil {
		panic(fmt.Sprintf("crypt: %v", err)) // only if the length is wrong
	}
	return &Sectors{c}
}

// Encrypt writes whole sectors, of which the first has a number, encrypted to dst, as
// long, which may be src itself.
func (s *Sectors) Encrypt(dst, src []byte, first int64) {
	for i := 0; i < len(src); i += SectorLen {
		s.cipher.Encrypt(dst[i:i+SectorLen], src[i:i+SectorLen], uint64(first))
		first++
	}
}

// Decrypt is the inverse of Encrypt, in place. A sector of nothing but zeros is what a
// file has where nothing was written or a hole was made, and stays as it is; 4096
// bits of cipher text are never all zero.
func (s *Sectors) Decrypt(p []byte, first int64) {
	for ; len(p) > 0; p = p[SectorLen:] {
		if sector := p[:SectorLen]; !isZero(sector) {
			s.cipher.Decrypt(sector, sector, uint64(first))
		}
		first++
	}
}

// isZero compares a sector with itself one byte on, which is a memequal; cipher text
// mostly ends at the first byte.
func isZero(p []byte) bool { return p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1]) }
