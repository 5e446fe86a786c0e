package crypt

import (
	"bytes"
	"fmt"
	"testing"
)

// sealPage seals a page into one of its own.
func sealPage(p *Pages, number int64, plain []byte) (page, seal []byte) {
	page, seal = make([]byte, len(plain)), make([]byte, PageSealLen)
	p.Seal(page, seal, number, plain, new(PageScratch))
	return page, seal
}

func TestSealedPageOpensToThePage(t *testing.T) {
	for _, fixed := range []bool{true, false} {
		p := testKey(t, 1).Pages("layer", fixed)
		for _, n := range []int{1, 512, MaxPage - 512, MaxPage} {
			plain := bytes.Repeat([]byte{9}, n)
			page, seal := sealPage(p, 1<<40, plain)
			if n > 16 && bytes.Contains(page, plain[:16]) {
				t.Errorf("fixed %t, %d bytes: they are in clear", fixed, n)
			}
			if !p.Open(page, seal, 1<<40, new(PageScratch)) || !bytes.Equal(page, plain) {
				t.Errorf("fixed %t, %d bytes: they do not come back", fixed, n)
			}
			in := bytes.Clone(plain)
			p.Seal(in, seal, 3, in, new(PageScratch)) // in place
			if !p.Open(in, seal, 3, new(PageScratch)) || !bytes.Equal(in, plain) {
				t.Errorf("fixed %t, %d bytes: not in place", fixed, n)
			}
		}
	}
}

// Several processes fill one base. Whatever each of them writes must go with what
// another one marks.
func TestFixedPagesAreTheSameWhoeverSealsThem(t *testing.T) {
	plain := bytes.Repeat([]byte{9}, MaxPage)
	one, two := testKey(t, 1).Pages("of snap-a", true), testKey(t, 1).Pages("of snap-a", true)
	page, seal := sealPage(one, 5, plain)
	page2, seal2 := sealPage(two, 5, plain)
	if !bytes.Equal(page, page2) || !bytes.Equal(seal, seal2) {
		t.Error("they differ")
	}
	if next, _ := sealPage(one, 6, plain); bytes.Equal(next, page) {
		t.Error("the next page is sealed alike: one key stream for two pages")
	}
}

// A page of a volume has one content after another: under one nonce they would give
// each other away.
func TestChangingPagesNeverUseANonceAgain(t *testing.T) {
	p := testKey(t, 1).Pages("of vol-a", false)
	plain := make([]byte, MaxPage)
	pages, nonces := make(map[string]bool), make(map[string]bool)
	for range 100 {
		page, seal := sealPage(p, 5, plain)
		if pages[string(page)] || nonces[string(seal[:nonceLen])] {
			t.Fatal("a page is sealed alike twice")
		}
		pages[string(page)], nonces[string(seal[:nonceLen])] = true, true
	}
}

func TestPageThatIsNotTheOneSealedDoesNotOpen(t *testing.T) {
	k := testKey(t, 1)
	for _, fixed := range []bool{true, false} {
		p := k.Pages("layer", fixed)
		page, seal := sealPage(p, 5, bytes.Repeat([]byte{9}, MaxPage))
		other, otherSeal := sealPage(p, 6, bytes.Repeat([]byte{8}, MaxPage))
		refused := func(how string, p *Pages, page, seal []byte, number int64) {
			t.Helper()
			if p.Open(bytes.Clone(page), seal, number, new(PageScratch)) {
				t.Errorf("fixed %t: %s", fixed, how)
			}
		}
		refused("moved", p, page, seal, 6)
		refused("moved far", p, page, seal, 5+1<<32)
		refused("another's seal", p, page, otherSeal, 5)
		refused("another's bytes", p, other, seal, 5)
		refused("another's nonce", p, page, append(bytes.Clone(otherSeal[:nonceLen]), seal[nonceLen:]...), 5)
		refused("another's tag", p, page, append(bytes.Clone(seal[:nonceLen]), otherSeal[nonceLen:]...), 5)
		refused("cut", p, page[:MaxPage-512], seal, 5)
		refused("another layer", k.Pages("layer 2", fixed), page, seal, 5)
		refused("another kind of layer", k.Pages("layer", !fixed), page, seal, 5)
		refused("another key", testKey(t, 2).Pages("layer", fixed), page, seal, 5)
		refused("zeros", p, make([]byte, MaxPage), make([]byte, PageSealLen), 0)
		for at := 0; at < MaxPage; at += 37 {
			bad := bytes.Clone(page)
			bad[at] ^= 1
			refused(fmt.Sprintf("byte %d", at), p, bad, seal, 5)
		}
		for at := range seal {
			bad := bytes.Clone(seal)
			bad[at] ^= 0x80
			refused(fmt.Sprintf("byte %d of the seal", at), p, page, bad, 5)
		}
	}
}

func TestOpeningAPageAllocatesNothing(t *testing.T) {
	p := testKey(t, 1).Pages("layer", true)
	sealed, seal := sealPage(p, 5, make([]byte, MaxPage))
	page, s := make([]byte, MaxPage), new(PageScratch)
	n := testing.AllocsPerRun(100, func() {
		copy(page, sealed)
		if !p.Open(page, seal, 5, s) {
			t.Fatal("it does not open")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	if n := testing.AllocsPerRun(100, func() { p.Seal(page, seal, 5, page, s) }); n != 0 {
		t.Errorf("sealing: %v allocations", n)
	}
}

func BenchmarkOpenPage(b *testing.B) {
	p := testKey(b, 1).Pages("layer", true)
	sealed, seal := sealPage(p, 5, make([]byte, MaxPage))
	page, s := make([]byte, MaxPage), new(PageScratch)
	b.SetBytes(MaxPage)
	for b.Loop() {
		copy(page, sealed)
		p.Open(page, seal, 5, s)
	}
}
