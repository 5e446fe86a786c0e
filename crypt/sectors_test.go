package crypt

import (
	"bytes"
	"crypto/aes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"golang.org/x/crypto/xts"
)

// IEEE Std 1619-2007, appendix B, vector 10: AES-256-XTS, data unit 0xff, 512 bytes
// 00, 01, … ff, twice.
const (
	vectorKey    = "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592"
	vectorSector = 0xff
	vectorBegin  = "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b"
)

// counting returns the plaintext of the vector.
func counting() []byte {
	p := make([]byte, SectorLen)
	for i := range p {
		p[i] = byte(i)
	}
	return p
}

func TestSectorsAreAES256XTS(t *testing.T) {
	key, err := hex.DecodeString(vectorKey)
	if err != nil {
		t.Fatal(err)
	}
	c, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		t.Fatal(err)
	}
	s := &Sectors{c}
	p := make([]byte, SectorLen)
	s.Encrypt(p, counting(), vectorSector)
	if got := hex.EncodeToString(p[:len(vectorBegin)/2]); got != vectorBegin {
		t.Errorf("the sector begins with %s, want %s", got, vectorBegin)
	}
	s.Decrypt(p, vectorSector)
	if !bytes.Equal(p, counting()) {
		t.Error("it does not come back")
	}
}

// The key of a layer is what docs/format.md says: whoever has the data key can read it.
func TestKeyOfSectorsIsDerivedFromTheSalt(t *testing.T) {
	k := testKey(t, 1)
	salt := bytes.Repeat([]byte{5}, SectorSaltLen)
	derived, err := hkdf.Key(sha256.New, bytes.Repeat([]byte{1}, KeyLen), salt, "lazyvol 1 sectors", 64)
	if err != nil {
		t.Fatal(err)
	}
	c, err := xts.NewCipher(aes.NewCipher, derived)
	if err != nil {
		t.Fatal(err)
	}
	want, got := make([]byte, 2*SectorLen), make([]byte, 2*SectorLen)
	plain := append(counting(), counting()...)
	c.Encrypt(want[:SectorLen], plain[:SectorLen], 7)
	c.Encrypt(want[SectorLen:], plain[SectorLen:], 8)
	k.Sectors(salt).Encrypt(got, plain, 7)
	if !bytes.Equal(got, want) {
		t.Error("the sectors are not encrypted under that key")
	}
	if bytes.Equal(got[:SectorLen], got[SectorLen:]) {
		t.Error("two sectors of one content look alike")
	}
	salt[0]++
	k.Sectors(salt).Encrypt(got, plain, 7)
	if bytes.Equal(got, want) {
		t.Error("another layer has the same key")
	}
	if a, b := NewSectorSalt(), NewSectorSalt(); len(a) != SectorSaltLen || bytes.Equal(a, b) {
		t.Errorf("salts %x and %x", a, b)
	}
}

func TestSectorsDoNotDependOnEachOther(t *testing.T) {
	s := testKey(t, 1).Sectors(NewSectorSalt())
	const n = 8
	plain := bytes.Repeat(counting(), n)
	whole := make([]byte, len(plain))
	s.Encrypt(whole, plain, 100)
	for i := range int64(n) {
		one := make([]byte, SectorLen)
		s.Encrypt(one, plain[:SectorLen], 100+i)
		if !bytes.Equal(one, whole[i*SectorLen:][:SectorLen]) {
			t.Errorf("sector %d is another one when it is written alone", i)
		}
	}
	// What a power cut leaves: sectors of two versions, one not written at all.
	newer := bytes.Repeat([]byte{3}, len(plain))
	mixed := make([]byte, len(plain))
	s.Encrypt(mixed, newer, 100)
	copy(mixed[2*SectorLen:], whole[2*SectorLen:5*SectorLen])
	clear(mixed[6*SectorLen : 7*SectorLen])
	s.Decrypt(mixed, 100)
	want := bytes.Clone(newer)
	copy(want[2*SectorLen:], plain[2*SectorLen:5*SectorLen])
	clear(want[6*SectorLen : 7*SectorLen])
	if !bytes.Equal(mixed, want) {
		t.Error("a sector is neither its old nor its new content")
	}
}

func TestHoleReadsAsZeros(t *testing.T) {
	s := testKey(t, 1).Sectors(NewSectorSalt())
	p := make([]byte, 3*SectorLen)
	s.Decrypt(p, 0)
	if !isZero(p) {
		t.Error("zeros became something else")
	}
	s.Encrypt(p, make([]byte, len(p)), 0) // zeros that were written are not left as they are
	for i := range 3 {
		if isZero(p[i*SectorLen:][:SectorLen]) {
			t.Error("zeros look like a hole")
		}
	}
	s.Decrypt(p, 0)
	if !isZero(p) {
		t.Error("they do not come back")
	}
}

func TestSectorsAreEncryptedInPlace(t *testing.T) {
	s := testKey(t, 1).Sectors(NewSectorSalt())
	plain := bytes.Repeat(counting(), 3)
	want, p := make([]byte, len(plain)), bytes.Clone(plain)
	s.Encrypt(want, plain, 5)
	s.Encrypt(p, p, 5)
	if !bytes.Equal(p, want) {
		t.Error("it is not the same")
	}
}
