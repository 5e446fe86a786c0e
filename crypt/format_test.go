package crypt

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// What the page's examples hold.
var (
	exampleID  = [fileKeyIDLen]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	exampleKey = [KeyLen]byte{31: 0xff}
)

const exampleKeyFile = keyFileComment + `lazyvol-key 1
id 000102030405060708090a0b0c0d0e0f
key 00000000000000000000000000000000000000000000000000000000000000ff
crc32c 51d8243e
`

func formatPage(t testing.TB) string {
	t.Helper()
	page, err := os.ReadFile("../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// exampleWrapped returns the bytes of one of the page's examples.
func exampleWrapped(t testing.TB, name string) []byte {
	t.Helper()
	_, rest, _ := strings.Cut(formatPage(t), "```hex "+name+"\n")
	example, _, _ := strings.Cut(rest, "```")
	data, err := hex.DecodeString(regexp.MustCompile(`#.*|\s`).ReplaceAllString(example, ""))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestFormatPageAgreesWithTheCode pins key files and wrapped keys to the examples
// on the page that specifies them.
func TestFormatPageAgreesWithTheCode(t *testing.T) {
	f := keyFile{id: exampleID, key: exampleKey}
	if got := string(f.encode()); got != exampleKeyFile {
		t.Errorf("the key file is\n%s", got)
	}
	if page := formatPage(t); !strings.Contains(page, "```text\n"+exampleKeyFile+"```") {
		t.Error("the page does not have the key file")
	}
	wrapped := exampleWrapped(t, "wrapped by a key file")
	w, err := decodeFileWrapped(wrapped)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := f.aead()
	if err != nil {
		t.Fatal(err)
	}
	plain, err := aead.Open(nil, nil, w.sealed, additionalData(w.bound, lineage))
	if want := bytes.Repeat([]byte{0x42}, KeyLen); err != nil || !bytes.Equal(plain, want) || w.id != exampleID {
		t.Errorf("the page's wrapped key unwraps to %x (%v)", plain, err)
	}
	blob, err := decodeKMSWrapped(exampleWrapped(t, "wrapped by AWS KMS"))
	if err != nil || string(blob) != "blob" {
		t.Errorf("the page's key wrapped by KMS has %q (%v)", blob, err)
	}
	for name, bound := range map[string]int{"MaxKeyFile": maxKeyFile, "MaxKeyURI": MaxURI, "MaxWrappedKey": maxWrappedByKMS} {
		if row := fmt.Sprintf("| `%s` | %d |", name, bound); !strings.Contains(formatPage(t), row) {
			t.Errorf("the page's table of bounds has no row %s", row)
		}
	}
}
