import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.atomic.AtomicLong;

/**
 * A service with a heap that changes all the time and is checked, which answers lines on port 7000: {@code count} with the next
 * number, {@code check} with {@code ok} or {@code wrong: N blocks} of what it has come across, {@code check-all} with the same
 * when it has looked at all.
 */
public final class LineServer {
    /** Blocks of 4 KiB: 256 MiB of live heap. */
    private static final int BLOCKS = 65536;
    private static final int WORDS = 512;
    /** Blocks that are replaced every 10 ms: an eighth of the heap in a second, which the collector has to find. */
    private static final int REPLACED = 80;
    private static final long TICK_MS = 10;

    private static final long[][] HEAP = new long[BLOCKS][];
    private static final long[] GENERATIONS = new long[BLOCKS];
    private static final AtomicLong COUNTED = new AtomicLong();
    private static final AtomicLong WRONG = new AtomicLong();

    private LineServer() {}

    /** What a place holds: SplitMix64 of where it is and how often that was replaced. */
    private static long word(int slot, long generation, int index) {
        long mixed = ((long) slot << 40 ^ generation << 16 ^ index) + 0x9e3779b97f4a7c15L;
        mixed = (mixed ^ mixed >>> 30) * 0xbf58476d1ce4e5b9L;
        mixed = (mixed ^ mixed >>> 27) * 0x94d049bb133111ebL;
        return mixed ^ mixed >>> 31;
    }

    private static void make(int slot) {
        long[] words = new long[WORDS];
        for (int index = 0; index < WORDS; index++) {
            words[index] = word(slot, GENERATIONS[slot], index);
        }
        HEAP[slot] = words;
    }

    private static void check(int slot) {
        long[] words = HEAP[slot];
        for (int index = 0; index < WORDS; index++) {
            if (words[index] != word(slot, GENERATIONS[slot], index)) {
                WRONG.incrementAndGet();
                return;
            }
        }
    }

    private static void change() {
        int slot = 0;
        while (true) {
            synchronized (HEAP) {
                for (int count = 0; count < REPLACED; count++) {
                    // A stride that is prime to the number of blocks: all of them in turn, far apart.
                    slot = (slot + 40503) % BLOCKS;
                    check(slot);
                    GENERATIONS[slot]++;
                    make(slot);
                }
            }
            try {
                Thread.sleep(TICK_MS);
            } catch (InterruptedException interrupted) {
                return;
            }
        }
    }

    private static String verdict() {
        long wrong = WRONG.get();
        return wrong == 0 ? "ok" : "wrong: " + wrong + " blocks";
    }

    private static String answer(String question) {
        switch (question) {
            case "count":
                return Long.toString(COUNTED.incrementAndGet());
            case "check":
                return verdict();
            case "check-all":
                synchronized (HEAP) {
                    for (int slot = 0; slot < BLOCKS; slot++) {
                        check(slot);
                    }
                }
                return verdict();
            default:
                return "there are count, check and check-all";
        }
    }

    private static void converse(Socket socket) {
        try (socket) {
            socket.setTcpNoDelay(true);
            var lines = new BufferedReader(new InputStreamReader(socket.getInputStream(), StandardCharsets.UTF_8));
            for (String line = lines.readLine(); line != null; line = lines.readLine()) {
                socket.getOutputStream().write((answer(line.trim()) + "\n").getBytes(StandardCharsets.UTF_8));
            }
        } catch (IOException gone) {
            // The client has hung up; there is nobody to tell.
        }
    }

    public static void main(String[] arguments) throws IOException {
        for (int slot = 0; slot < BLOCKS; slot++) {
            make(slot);
        }
        var changing = new Thread(LineServer::change, "change");
        changing.setDaemon(true);
        changing.start();
        try (var server = new ServerSocket(7000)) {
            while (true) {
                Socket socket = server.accept();
                new Thread(() -> converse(socket), "client").start();
            }
        }
    }
}
