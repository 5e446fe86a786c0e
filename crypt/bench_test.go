package crypt

import (
	"fmt"
	"testing"
)

// What a page that is written costs, and what a block that is fetched.
func BenchmarkSeals(b *testing.B) {
	key, err := NewKey(make([]byte, KeyLen))
	if err != nil {
		b.Fatal(err)
	}
	page := make([]byte, MaxPage)
	sectors := key.Sectors(NewSectorSalt())
	block := make([]byte, 512<<10)
	whole := key.Seal(nil, nil, block)
	for _, bench := range []struct {
		name string
		size int
		do   func()
	}{
		{"encrypt the sectors of a page", MaxPage, func() { sectors.Encrypt(page, page, 8) }},
		{"open a block", len(block), func() {
			if _, err := key.Open(block[:0], nil, whole); err != nil {
				b.Fatal(err)
			}
		}},
	} {
		b.Run(fmt.Sprintf("%s of %d", bench.name, bench.size), func(b *testing.B) {
			b.SetBytes(int64(bench.size))
			for b.Loop() {
				bench.do()
			}
		})
	}
}
