package crypt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
)

// testKey returns the key of a data key of equal bytes.
func testKey(t testing.TB, b byte) *Key {
	t.Helper()
	k, err := NewKey(bytes.Repeat([]byte{b}, KeyLen))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// testObject returns a binary object of n bytes, as its format encodes it.
func testObject(n int) []byte {
	b := append([]byte("LVXX\x01\x00\x00\x00"), bytes.Repeat([]byte("what it holds "), n/14+1)...)
	return b[:n]
}

func TestSealedOpensToWhatWasSealed(t *testing.T) {
	k := testKey(t, 1)
	for _, n := range []int{0, 1, 15, 16, 17, 512, 4096, 100_000} {
		plain := bytes.Repeat([]byte{7}, n)
		sealed := k.Seal([]byte("before"), []byte("name"), plain)
		if want := len("before") + n + Overhead; len(sealed) != want || k.Overhead() != Overhead {
			t.Errorf("%d bytes become %d, not %d", n, len(sealed), want)
		}
		got, err := k.Open([]byte("kept"), []byte("name"), sealed[len("before"):])
		if err != nil || !bytes.HasPrefix(got, []byte("kept")) || !bytes.Equal(got[len("kept"):], plain) {
			t.Errorf("%d bytes: %d come back, %v", n, len(got), err)
		}
		if n >= 16 && bytes.Contains(sealed, plain[:16]) {
			t.Errorf("%d bytes: they are in clear", n)
		}
	}
}

func TestSealedObjectOpensToTheObject(t *testing.T) {
	k := testKey(t, 1)
	for _, n := range []int{headerLen, headerLen + 1, 1000} {
		object := testObject(n)
		sealed := k.SealObject("name", bytes.Clone(object))
		if len(sealed) != n+ObjectOverhead || k.ObjectOverhead() != ObjectOverhead {
			t.Errorf("%d bytes become %d", n, len(sealed))
		}
		want := append(bytes.Clone(object[:flagsAt]), object[flagsAt]|flagSealed, object[flagsAt+1])
		if !bytes.Equal(sealed[:headerLen], want) {
			t.Errorf("the header is %x, want %x", sealed[:headerLen], want)
		}
		got, err := k.OpenObject("name", sealed)
		if err != nil || !bytes.Equal(got, object) {
			t.Errorf("%d bytes: %x, %v", n, got, err)
		}
	}
}

// Every way to change what is sealed, for both kinds of seal.
func TestWhatIsChangedIsForged(t *testing.T) {
	k, other := testKey(t, 1), testKey(t, 2)
	object := testObject(200)
	for what, c := range map[string]struct {
		seal func() []byte
		open func(k *Key, name string, sealed []byte) ([]byte, error)
	}{
		"seal": {
			func() []byte { return k.Seal(nil, []byte("a name"), object) },
			func(k *Key, name string, sealed []byte) ([]byte, error) { return k.Open(nil, []byte(name), sealed) },
		},
		"object": {
			func() []byte { return k.SealObject("a name", object) },
			func(k *Key, name string, sealed []byte) ([]byte, error) { return k.OpenObject(name, sealed) },
		},
	} {
		t.Run(what, func(t *testing.T) {
			sealed := c.seal()
			refused := func(how string, k *Key, name string, sealed []byte) {
				t.Helper()
				got, err := c.open(k, name, sealed)
				if !errors.Is(err, ErrForged) && !errors.Is(err, ErrUnsealed) || len(got) > 0 {
					t.Errorf("%s: %d bytes, %v", how, len(got), err)
				}
			}
			for at := range sealed {
				for bit := range 8 {
					bad := bytes.Clone(sealed)
					bad[at] ^= 1 << bit
					refused(fmt.Sprintf("byte %d, bit %d", at, bit), k, "a name", bad)
				}
			}
			for n := range sealed {
				refused(fmt.Sprintf("cut to %d", n), k, "a name", sealed[:n])
				refused(fmt.Sprintf("cut from %d", n+1), k, "a name", sealed[n+1:])
			}
			refused("longer", k, "a name", append(bytes.Clone(sealed), 0))
			for _, name := range []string{"", "a nam", "a name ", "another name"} {
				refused("name "+name, k, name, sealed)
			}
			refused("another key", other, "a name", sealed)
			again := c.seal()
			for _, cut := range []int{headerLen + 1, saltLen, headerLen + saltLen, len(sealed) - tagLen} {
				refused(fmt.Sprintf("two halves, at %d", cut), k, "a name", append(bytes.Clone(sealed[:cut]), again[cut:]...))
			}
		})
	}
}

// What is sealed as one thing does not open as another, whatever the name.
func TestSealsOfDifferentKindsDoNotMix(t *testing.T) {
	k := testKey(t, 1)
	object := testObject(100)
	sealed := k.SealObject("name", object)
	if _, err := k.Open(nil, []byte("name"), sealed[headerLen:]); !errors.Is(err, ErrForged) {
		t.Errorf("an object opens as a slot: %v", err)
	}
	disguised := append(bytes.Clone(sealed[:headerLen]), k.Seal(nil, []byte("name"), object)...)
	if _, err := k.OpenObject("name", disguised); !errors.Is(err, ErrForged) {
		t.Errorf("a slot opens as an object: %v", err)
	}
}

func TestObjectInClearIsUnsealed(t *testing.T) {
	k := testKey(t, 1)
	object := testObject(200)
	if _, err := k.OpenObject("name", object); !errors.Is(err, ErrUnsealed) {
		t.Errorf("%v", err)
	}
	if _, err := k.OpenObject("name", object[:ObjectOverhead-1]); err == nil {
		t.Error("a short one is taken")
	}
}

// Equal plaintext must look different each time: the salts are fresh.
func TestNoTwoSealsAreAlike(t *testing.T) {
	k := testKey(t, 1)
	plain := bytes.Repeat([]byte{0}, 64)
	seen := make(map[string]bool)
	for range 100 {
		sealed := k.Seal(nil, []byte("name"), plain)
		for off := 0; off+16 <= len(sealed); off += 16 {
			window := string(sealed[off : off+16])
			if seen[window] {
				t.Fatalf("16 bytes are the same again, at %d", off)
			}
			seen[window] = true
		}
	}
}

func TestNoKeySealsNothing(t *testing.T) {
	var k *Key
	object := testObject(100)
	if got := k.Seal([]byte("x"), []byte("name"), object); !bytes.Equal(got[1:], object) || k.Overhead() != 0 {
		t.Errorf("seal: %x", got)
	}
	if got, err := k.Open([]byte("x"), []byte("name"), object); err != nil || !bytes.Equal(got[1:], object) {
		t.Errorf("open: %x, %v", got, err)
	}
	if got := k.SealObject("name", object); !bytes.Equal(got, object) || k.ObjectOverhead() != 0 {
		t.Errorf("seal object: %x", got)
	}
	if got, err := k.OpenObject("name", object); err != nil || !bytes.Equal(got, object) {
		t.Errorf("open object: %x, %v", got, err)
	}
	if k.Pages("layer", true) != nil || k.Pages("layer", false) != nil {
		t.Error("there are pages")
	}
}

func TestDataKeyHasItsLengthAndIsCopied(t *testing.T) {
	for _, n := range []int{0, KeyLen - 1, KeyLen + 1} {
		if _, err := NewKey(make([]byte, n)); err == nil {
			t.Errorf("%d bytes are a key", n)
		}
	}
	data := bytes.Repeat([]byte{1}, KeyLen)
	k, err := NewKey(data)
	if err != nil {
		t.Fatal(err)
	}
	sealed := k.Seal(nil, nil, []byte("text"))
	clear(data) // as whoever unwrapped it does
	if _, err := k.Open(nil, nil, sealed); err != nil {
		t.Errorf("the key is gone with what it was made of: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	k, err := NewKey(bytes.Repeat([]byte{1}, KeyLen))
	if err != nil {
		f.Fatal(err)
	}
	object := binary.LittleEndian.AppendUint64([]byte("LVXX\x01\x00\x00\x00"), 7)
	for _, seed := range [][]byte{k.Seal(nil, []byte("name"), object), k.SealObject("name", object), object, {}} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		// What opens is what somebody with the key has sealed.
		if got, err := k.Open(nil, []byte("name"), data); err == nil && !bytes.Equal(got, object) {
			t.Fatalf("%x opens", data)
		}
		if got, err := k.OpenObject("name", data); err == nil && !bytes.Equal(got, object) {
			t.Fatalf("%x opens as an object", data)
		} else if err != nil && !errors.Is(err, ErrForged) && !errors.Is(err, ErrUnsealed) {
			t.Fatal(err)
		}
	})
}
