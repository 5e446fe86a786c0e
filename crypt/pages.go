package crypt

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
)

const (
	// MaxPage bounds a page, in bytes.
	MaxPage = 4096

	// PageSealLen is the length of what [Pages.Seal] puts beside a page: nonce and tag.
	PageSealLen = nonceLen + tagLen
)

// Pages seals the pages of one layer of clean bytes on a host, with AES-256-GCM. A
// sealed page is as long as the page; nonce and tag are kept apart. It never changes,
// and its methods may be called concurrently, each with a scratch of its own.
type Pages struct {
	gcm   cipher.AEAD
	fixed bool
}

// A PageScratch is the working memory of a Pages.
type PageScratch struct {
	sealed [MaxPage + tagLen]byte
	number [8]byte
}

// Pages returns what seals the pages of a layer of this name. Of a fixed layer each
// page has one content for ever: its nonce is the page's number, so that whoever seals
// it makes the same of it. In another layer nonces are random, of 96 bits. Of a nil
// key it is nil.
func (k *Key) Pages(layer string, fixed bool) *Pages {
	if k == nil {
		return nil
	}
	purpose := "changing pages "
	if fixed {
		purpose = "fixed pages "
	}
	return &Pages{newGCM(k.derive(nil, purpose+layer, KeyLen)), fixed}
}

// Seal writes a page of at most MaxPage bytes, sealed, to dst, as long, and its nonce
// and tag to seal, PageSealLen bytes. dst may be plain itself.
func (p *Pages) Seal(dst, seal []byte, page int64, plain []byte, s *PageScratch) {
	binary.LittleEndian.PutUint64(s.number[:], uint64(page))
	nonce := seal[:nonceLen]
	if p.fixed {
		clear(nonce)
		copy(nonce, s.number[:])
	} else {
		rand.Read(nonce) // never fails: crypto/rand
	}
	sealed := p.gcm.Seal(s.sealed[:0], nonce, plain, s.number[:])
	copy(dst, sealed[:len(plain)])
	copy(seal[nonceLen:PageSealLen], sealed[len(plain):])
}

// Open replaces a sealed page by the page, and reports whether it is what was sealed
// under this number. If not, page has any content.
func (p *Pages) Open(page, seal []byte, number int64, s *PageScratch) bool {
	binary.LittleEndian.PutUint64(s.number[:], uint64(number))
	n := copy(s.sealed[:MaxPage], page)
	n += copy(s.sealed[n:], seal[nonceLen:PageSealLen])
	_, err := p.gcm.Open(page[:0], seal[:nonceLen], s.sealed[:n], s.number[:])
	return err == nil
}
