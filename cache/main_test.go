package cache

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/crypt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testKey returns the data key of a lineage, another one for each seed.
func testKey(seed byte) *crypt.Key {
	key, err := crypt.NewKey(bytes.Repeat([]byte{seed}, crypt.KeyLen))
	if err != nil {
		panic(err)
	}
	return key
}

// plainAndSealed runs a test with clean layers that are not sealed, with sealed bases,
// and with sealed layers of a volume's own.
func plainAndSealed(t *testing.T, test func(t *testing.T, pages *crypt.Pages)) {
	t.Run("plain", func(t *testing.T) { test(t, nil) })
	t.Run("sealed base", func(t *testing.T) { test(t, testKey(1).Pages("base", true)) })
	t.Run("sealed", func(t *testing.T) { test(t, testKey(1).Pages("volume", false)) })
}

// plainAndEncrypted runs a test with what is not encrypted and with what is.
func plainAndEncrypted(t *testing.T, test func(t *testing.T, key *crypt.Key)) {
	t.Run("plain", func(t *testing.T) { test(t, nil) })
	t.Run("encrypted", func(t *testing.T) { test(t, testKey(1)) })
}
