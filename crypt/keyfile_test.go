package crypt

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const lineage = "1a2b3c4d"

// newKeyFile returns the path and the URI of a new key file.
func newKeyFile(t *testing.T) (path, uri string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "a key")
	uri, _, err := CreateKeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, uri
}

func TestKeyFileUnwrapsWhatItWrapped(t *testing.T) {
	path, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	unclean := strings.Replace(uri, "file:///", "file:///x/..//", 1)
	plain, wrapped, canonical, err := keys.Generate(t.Context(), unclean, lineage)
	if err != nil {
		t.Fatal(err)
	}
	if len(plain) != KeyLen || bytes.Contains(wrapped, plain) || bytes.Equal(plain, make([]byte, KeyLen)) {
		t.Errorf("the data key is %x, wrapped %x", plain, wrapped)
	}
	if canonical != "file://"+strings.ReplaceAll(path, " ", "%20") {
		t.Errorf("canonical URI %s of %s", canonical, path)
	}
	for range 2 {
		got, err := NewKeys(Options{}).Unwrap(t.Context(), canonical, wrapped, lineage)
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("unwraps to %x (%v), want %x", got, err, plain)
		}
	}
	other, otherWrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil || bytes.Equal(other, plain) || bytes.Equal(otherWrapped, wrapped) {
		t.Errorf("two data keys: %x and %x (%v)", plain, other, err)
	}
}

func TestKeyFileIsMadeOnceAndForItsOwnerOnly(t *testing.T) {
	path, uri := newKeyFile(t)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Fatalf("mode %v (%v), want 0600", info.Mode(), err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := CreateKeyFile(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the refusal changed the file (%v)", err)
	}
	link := path + ".link" // which would make the key somewhere else
	if err := os.Symlink(path+".target", link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := CreateKeyFile(link); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made through a dangling link: %v", err)
	}
	missing := filepath.Join(path+".dir", "key")
	if _, _, err := CreateKeyFile(missing); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("made in no directory: %v", err)
	}
	t.Chdir(filepath.Dir(path))
	relative, _, err := CreateKeyFile("relative")
	if want := uri[:strings.LastIndex(uri, "/")] + "/relative"; err != nil || relative != want {
		t.Errorf("the URI is %s (%v), want %s", relative, err, want)
	}
	entries, err := os.ReadDir(".")
	if err != nil || len(entries) != 3 {
		t.Errorf("there are %v (%v), want the key, the link, and the relative one", entries, err)
	}
}

func TestKeyFileThatOthersMayUseIsRefused(t *testing.T) {
	path, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	_, wrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{
		0o600: true, 0o400: true, 0o700: true, 0o640: false, 0o604: false, 0o620: false, 0o602: false, 0o601: false, 0o644: false, 0o666: false,
	} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := keys.Unwrap(t.Context(), uri, wrapped, lineage)
		_, _, _, generate := keys.Generate(t.Context(), uri, lineage)
		if ok {
			if err != nil || generate != nil {
				t.Errorf("%v: %v, %v", mode, err, generate)
			}
			continue
		}
		for _, err := range []error{err, generate} {
			if !errors.Is(err, ErrKeyDenied) || !strings.Contains(err.Error(), fmt.Sprintf("chmod 600 %q", path)) {
				t.Errorf("%v: %v, want ErrKeyDenied and the chmod to run", mode, err)
			}
		}
	}
}

func TestKeyFileOfAnotherUserIsDenied(t *testing.T) {
	path, _ := newKeyFile(t)
	if err := os.Chmod(path, 0); err != nil { // for tests that are not run by root
		t.Fatal(err)
	}
	denied := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if _, err := unix.SetfsuidRetUid(65534); err != nil {
			denied <- err
			return
		}
		_, err := readKeyFile(path)
		denied <- err
	}()
	if err := <-denied; !errors.Is(err, ErrKeyDenied) {
		t.Errorf("%v, want ErrKeyDenied", err)
	}
}

func TestMissingKeyFileIsNotFound(t *testing.T) {
	path, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	_, wrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	_, err = keys.Unwrap(t.Context(), uri, wrapped, lineage)
	_, _, _, generate := keys.Generate(t.Context(), uri, lineage)
	for _, err := range []error{err, generate} {
		if !errors.Is(err, ErrKeyNotFound) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v, want ErrKeyNotFound with the path", err)
		}
	}
}

func TestWrongKeyFileIsToldFromADamagedOne(t *testing.T) {
	path, uri := newKeyFile(t)
	_, other := newKeyFile(t)
	keys := NewKeys(Options{})
	_, wrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	mine, err := readKeyFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = keys.Unwrap(t.Context(), other, wrapped, lineage)
	if !errors.Is(err, ErrWrongKey) || errors.Is(err, ErrKeyFormat) || !strings.Contains(err.Error(), fmt.Sprintf("wrapped by key id %x, but", mine.id)) {
		t.Errorf("another key file: %v, want ErrWrongKey with both ids", err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text[bytes.Index(text, []byte("\nkey "))+10] ^= 1 // from one hex digit to another
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = keys.Unwrap(t.Context(), uri, wrapped, lineage)
	if !errors.Is(err, ErrKeyFormat) || errors.Is(err, ErrWrongKey) {
		t.Errorf("the damaged key file: %v, want ErrKeyFormat", err)
	}
}

func TestWrappedKeyIsBoundToItsLineageAndEveryByteOfItself(t *testing.T) {
	_, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	plain, wrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"", "1a2b3c4", "1a2b3c4e", "1a2b3c4d0"} {
		if _, err := keys.Unwrap(t.Context(), uri, wrapped, other); !errors.Is(err, ErrWrongKey) {
			t.Errorf("for the lineage %q: %v, want ErrWrongKey", other, err)
		}
	}
	for i := range wrapped {
		damaged := bytes.Clone(wrapped)
		damaged[i] ^= 0x10
		_, err := keys.Unwrap(t.Context(), uri, damaged, lineage)
		if !errors.Is(err, ErrWrongKey) && !(i < headerLen && errors.Is(err, ErrKeyFormat)) {
			t.Errorf("with byte %d damaged: %v", i, err)
		}
		if err != nil && strings.Contains(err.Error(), hex.EncodeToString(plain)) {
			t.Errorf("the error tells the key: %v", err)
		}
	}
	for n := range len(wrapped) {
		if _, err := keys.Unwrap(t.Context(), uri, wrapped[:n], lineage); !errors.Is(err, ErrKeyFormat) {
			t.Errorf("the first %d bytes: %v, want ErrKeyFormat", n, err)
		}
	}
	if _, err := keys.Unwrap(t.Context(), uri, append(bytes.Clone(wrapped), 0), lineage); !errors.Is(err, ErrKeyFormat) {
		t.Errorf("a byte too many: %v, want ErrKeyFormat", err)
	}
}

func TestWrappedKeyOfANewerBuildIsRefusedByName(t *testing.T) {
	_, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	_, byFile, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	for uri, wrapped := range map[string][]byte{uri: byFile, "awskms:///" + testARN: encodeKMSWrapped([]byte("blob"))} {
		for at, hint := range map[int]string{4: "version 3", 5: "version 513", 6: "flags 0x2", 7: "flags 0x200"} {
			newer := bytes.Clone(wrapped)
			newer[at] ^= 2
			if _, err := keys.Unwrap(t.Context(), uri, newer, lineage); !errors.Is(err, ErrKeyFormat) || !strings.Contains(err.Error(), hint) {
				t.Errorf("%s, byte %d: %v, want ErrKeyFormat with %q", uri, at, err, hint)
			}
		}
	}
}

func TestWhatIsNoKeyFileIsRefused(t *testing.T) {
	path, uri := newKeyFile(t)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good := string(text)
	id := good[strings.Index(good, "id "):strings.Index(good, "\nkey ")]
	for what, c := range map[string]struct{ text, hint string }{
		"empty":         {"", "empty"},
		"comments only": {keyFileComment, "empty"},
		"another file":  {"-----BEGIN PRIVATE KEY-----\n", "no key file"},
		"newer":         {strings.Replace(good, "lazyvol-key 1", "lazyvol-key 2", 1), "version 2"},
		"no version":    {strings.Replace(good, "lazyvol-key 1", "lazyvol-key x", 1), "version"},
		"cut":           {good[:len(good)-5], "crc32c"},
		"cut more":      {good[:strings.Index(good, "crc32c")], "lines"},
		"long":          {good + strings.Repeat("#\n", maxKeyFile/2), "at most"},
		"another id":    {strings.Replace(good, id, "id 000102030405060708090a0b0c0d0e0f", 1), "checksum"},
		"no id":         {strings.Replace(good, id, "ie"+id[2:], 1), "'id'"},
		"a digit more":  {strings.Replace(good, "\nkey ", "\nkey 0", 1), "'key'"},
		"no hex":        {strings.Replace(good, id, "id "+strings.Repeat("xy", fileKeyIDLen), 1), "'id'"},
		"twice":         {good + good, "lines"},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, _, err := NewKeys(Options{}).Generate(t.Context(), uri, lineage)
		if !errors.Is(err, ErrKeyFormat) || !strings.Contains(err.Error(), c.hint) {
			t.Errorf("%s: %v, want ErrKeyFormat with %q", what, err, c.hint)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	for what, make := range map[string]func() error{
		"directory": func() error { return os.Mkdir(path, 0o700) },
		"pipe":      func() error { return syscall.Mkfifo(path, 0o600) }, // which nobody will ever write to
	} {
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if _, err := readKeyFile(path); !errors.Is(err, ErrKeyFormat) || !strings.Contains(err.Error(), "regular file") {
			t.Errorf("%s: %v, want ErrKeyFormat and why", what, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKeyFileSurvivesAnEditor(t *testing.T) {
	path, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	plain, wrapped, _, err := keys.Generate(t.Context(), uri, lineage)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good := string(text)
	for what, edited := range map[string]string{
		"no newline at its end": strings.TrimSuffix(good, "\n"),
		"Windows newlines":      strings.ReplaceAll(good, "\n", "\r\n"),
		"empty lines":           strings.ReplaceAll(good, "\n", "\n\n"),
		"comments":              "# of the old cluster\n" + good + "# keep\n",
		"no comments":           strings.TrimPrefix(good, keyFileComment),
	} {
		if err := os.WriteFile(path, []byte(edited), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := keys.Unwrap(t.Context(), uri, wrapped, lineage); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestUsesOfAKeyFileDoNotDisturbEachOther(t *testing.T) {
	_, uri := newKeyFile(t)
	keys := NewKeys(Options{})
	errs := make(chan error)
	const users = 8
	for i := range users {
		go func() {
			errs <- func() error {
				lineage := fmt.Sprintf("%08x", i+1)
				plain, wrapped, _, err := keys.Generate(context.Background(), uri, lineage)
				if err != nil {
					return err
				}
				got, err := keys.Unwrap(context.Background(), uri, wrapped, lineage)
				if err == nil && !bytes.Equal(got, plain) {
					err = fmt.Errorf("lineage %s: another key", lineage)
				}
				return err
			}()
		}()
	}
	for range users {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func FuzzKeyFile(f *testing.F) {
	f.Add([]byte(exampleKeyFile))
	f.Add([]byte(""))
	f.Add([]byte("lazyvol-key 2\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := decodeKeyFile(text)
		if err != nil {
			if !errors.Is(err, ErrKeyFormat) || k != nil {
				t.Fatal(k, err)
			}
			return
		}
		again, err := decodeKeyFile(k.encode())
		if err != nil || *again != *k {
			t.Fatalf("%q is not what its encoding decodes to: %v", text, err)
		}
	})
}

func FuzzWrappedKey(f *testing.F) {
	f.Add(exampleWrapped(f, "wrapped by a key file"))
	f.Add(exampleWrapped(f, "wrapped by AWS KMS"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, wrapped []byte) {
		before := bytes.Clone(wrapped)
		file, fileErr := decodeFileWrapped(wrapped)
		blob, kmsErr := decodeKMSWrapped(wrapped)
		for _, err := range []error{fileErr, kmsErr} {
			if err != nil && !errors.Is(err, ErrKeyFormat) && !errors.Is(err, ErrWrongKey) {
				t.Fatal(err)
			}
		}
		switch {
		case fileErr == nil && kmsErr == nil:
			t.Fatal("wrapped by both")
		case fileErr == nil:
			if got := append(bytes.Clone(file.bound), file.sealed...); !bytes.Equal(got, wrapped) || !bytes.HasSuffix(file.bound, file.id[:]) {
				t.Fatalf("decodes to %x", got)
			}
		case kmsErr == nil:
			if got := encodeKMSWrapped(blob); !bytes.Equal(got, wrapped) {
				t.Fatalf("decodes to %x", got)
			}
		}
		if !bytes.Equal(wrapped, before) {
			t.Fatal("decoding changed it")
		}
	})
}
